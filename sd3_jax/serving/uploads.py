"""Uploaded pictures: checked, and kept as files for as long as their request lives."""

import io
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sd3_jax.data import images
from sd3_jax.serving.api_errors import ApiError, invalid, public


class Spool:
    """A private folder of uploads, whose files a batch reads as `sample` reads its."""

    def __init__(self, folder: str | None = None):
        # Each process has its own: hosts share no disk, so a batch brings its files.
        self.folder = Path(folder or tempfile.mkdtemp(prefix="sd3_jax_uploads_"))
        # Private uploads: other users of the host may not read them.
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        # Whole or not at all: processes that share a folder may write the same file.
        draft = self.folder / f"{name}.{os.getpid()}"
        draft.write_bytes(data)
        draft.replace(path)
        return str(path)

    def remove(self, paths) -> None:
        for path in paths:
            Path(path).unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# Called before pixels are decoded: a PNG of a few kilobytes can hold gigapixels.
def picture(data: bytes, name: str, most: int) -> Image.Image:
    """An opened upload; ApiError for other files, and for over `most` pixels."""
    try:
        opened = images.open_header(data, name)
    except images.BadImage as error:
        raise invalid(public(str(error)), name, "invalid_image") from None
    if opened.width * opened.height > most:
        raise ApiError(
            400,
            f"{name}: {opened.width} x {opened.height} pixels; expected at most {most}",
            code="image_too_large",
            param=name,
        )
    return opened


def checked_image(data: bytes, most: int) -> bytes:
    """The bytes of a picture that can be decoded; ApiError for others."""
    # Headers may be intact above damaged pixels, which would fail a whole batch.
    _decoded(picture(data, "image", most), "image")
    return data


def mask_file(data: bytes, most: int) -> bytes:
    """A mask as a grey PNG, white where the picture is repainted.

    OpenAI's masks are transparent there; a grey one is taken as it is.
    """
    opened = picture(data, "mask", most)
    pixels = _decoded(opened, "mask")
    if "A" in opened.mode or "transparency" in opened.info:
        # Only fully transparent pixels are repainted, as OpenAI documents its masks. An
        # alpha channel that is opaque everywhere says nothing, and the colours decide.
        alpha = np.asarray(opened.convert("RGBA").getchannel("A"))
        if (alpha != 255).any():
            pixels = np.where(alpha == 0, np.uint8(255), np.uint8(0))
            return _png(pixels)
    if (pixels != pixels[..., :1]).any():
        raise invalid(
            "mask: has colours; expected transparency, or white in a grey picture,"
            " where the picture is repainted",
            "mask",
            "invalid_image",
        )
    return _png(pixels[..., 0])


def _decoded(opened: Image.Image, name: str) -> np.ndarray:
    try:
        return images.pixels(opened, name)
    except images.BadImage as error:
        raise invalid(public(str(error)), name, "invalid_image") from None


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
