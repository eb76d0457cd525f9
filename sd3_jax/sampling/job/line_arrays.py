"""The arrays of a line: its pictures and masks, its ControlNets, its LoRAs.

They are read when the batch of the line runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image, ImageOps

from sd3_jax.data import images
from sd3_jax.errors import UserError
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.control import ControlBundle, ControlInput
from sd3_jax.sampling.job.line_inputs import Size

WHITE = 128  # from this byte on a mask's pixel is repainted


class Row(NamedTuple):
    """The pixels of one picture's line."""

    image: UInt8[ndarray, "h w 3"] | None
    mask: UInt8[ndarray, "h w"] | None
    hints: tuple[UInt8[ndarray, "h w 3"], ...]
    hint_masks: tuple[UInt8[ndarray, "h w"] | None, ...]


def read_checked_row(settings: Mapping[str, Any], size: Size) -> Row:
    """read_row; UserError if the picture is no longer of the size that was checked."""
    row = read_row(settings)
    left, top, right, bottom = settings.get("outpaint") or (0, 0, 0, 0)
    inner = size[0] - top - bottom, size[1] - left - right
    # Rows of a batch are stacked, so that one of another size would end the job.
    for pixels in (row.image, row.mask):
        if pixels is not None and pixels.shape[:2] != inner:
            raise UserError(f"{settings['image']}: it or its mask changed its size")
    return row


def read_row(settings: Mapping[str, Any]) -> Row:
    """The pixels of a line; BadImage if a file cannot be decoded."""
    left, top, right, bottom = settings.get("outpaint") or (0, 0, 0, 0)
    how = settings.get("resize", "")
    sides = settings["height"], settings["width"]
    # height and width are those of the result: the picture fills what the border
    # leaves.
    inner = sides[0] - top - bottom, sides[1] - left - right
    if how and min(inner) < 1:
        raise UserError(
            f"outpaint: the border fills all of {sides[0]} x {sides[1]} pixels"
        )
    image, mask_path = settings.get("image"), settings.get("mask")
    mask = _resized_mask(mask_path, inner, how) if mask_path else None
    crops = "crop_to_mask" in settings and not settings.get("outpaint")
    # Known only now: headers do not tell whether a mask is black. Refused here, it
    # costs one line and not its batch.
    if crops and mask is not None and not mask.any():
        raise UserError(f"mask {mask_path} is black; expected white where to repaint")
    controls = settings.get("control") or ()
    hints = [(control["image"], control.get("mask")) for control in controls]
    return Row(
        resize(_decoded(image), inner, how) if image else None,
        mask,
        tuple(resize(_decoded(x), sides, how) for x, _ in hints),
        tuple(_resized_mask(x, sides, how) if x else None for _, x in hints),
    )


def _resized_mask(path: str, sides: Size, how: str) -> UInt8[ndarray, "h w"]:
    """A mask at sides (height, width); UserError if resizing loses all of it."""
    whole = _decoded_mask(path)
    mask = resize(whole, sides, how)
    # Thin lines fall between the pixels that NEAREST takes.
    if (whole >= WHITE).any() and not (mask >= WHITE).any():
        raise UserError(
            f"mask {path}: nothing is left of the mask after resizing to {sides[0]} x"
            f" {sides[1]}; draw it wider, or at this size"
        )
    return mask


def resize(pixels: ndarray, sides: Size, how: str) -> ndarray:
    """Pixels at sides (height, width): stretched, or cut off around the centre."""
    size = sides[1], sides[0]
    if not how or pixels.shape[:2] == sides:
        return pixels
    # A mask stays black and white.
    grey = pixels.ndim == 2
    method = Image.Resampling.NEAREST if grey else Image.Resampling.LANCZOS
    picture = Image.fromarray(pixels)
    # Centred, as ImageOps.fit is by default.
    if how == "crop":
        return np.asarray(ImageOps.fit(picture, size, method))
    return np.asarray(picture.resize(size, method))


def _decoded(path: str) -> UInt8[ndarray, "h w 3"]:
    return images.pixels(images.open_header(images.read_bytes(path), path), path)


def _decoded_mask(path: str) -> UInt8[ndarray, "h w"]:
    """A mask, which programs also write as RGB; BadImage for colours and alpha."""
    picture = images.open_header(images.read_bytes(path), path)
    pixels = images.pixels(picture, path)
    # An alpha channel may be the mask itself, and a colour is no share: which is meant
    # cannot be known.
    alpha = "A" in picture.mode and picture.getchannel("A").getextrema() != (255, 255)
    if alpha or (pixels != pixels[..., :1]).any():
        raise images.BadImage(
            f"mask {path}: has colours or an alpha channel; expected grey, white where"
            " the picture is repainted"
        )
    return pixels[..., 0]


def arguments(
    settings: Mapping[str, Any], rows: Sequence[Row], nets: Mapping[str, ControlBundle]
) -> dict[str, Any]:
    """generate's arguments for rows of one group; {} for text alone."""
    keywords: dict[str, Any] = {}
    if settings.get("image"):
        keywords["image"] = _floats([row.image for row in rows])
        keywords["strength"] = settings["strength"]
    if settings.get("mask"):
        keywords["mask"] = _floats([row.mask for row in rows])
    if settings.get("mask") or settings.get("outpaint"):
        names = ("paste", "mask_blur", "mask_padding")
        keywords |= {name: settings[name] for name in names}
        keywords["crop_to_mask"] = settings.get("crop_to_mask")
        keywords["outpaint"] = settings.get("outpaint")
    if controls := settings.get("control"):
        keywords["control"] = [
            _control_input(i, control, rows, nets) for i, control in enumerate(controls)
        ]
    return keywords


def _floats(pixels: Sequence[ndarray]) -> Float32[ndarray, "n h w *c"]:
    """Bytes of files in [0, 1].

    A file's 1 is 1 / 255: generate refuses arrays of bytes 0 and 1, where 1 may be
    meant as white.
    """
    return np.stack(pixels).astype(np.float32) / 255


def _control_input(i: int, control: dict, rows, nets) -> ControlInput:
    masks = [row.hint_masks[i] for row in rows]
    return ControlInput(
        nets[control["net"]],
        _floats([row.hints[i] for row in rows]),
        control["scale"],
        control["start"],
        control["stop"],
        _floats(masks) if control.get("mask") else None,
        control.get("preprocess"),
    )


def adapters(model: Any, loras: Sequence[str] | None) -> dict[str, Any]:
    """generate's `adapters` for a line's LoRAs, which are loaded; {} for None.

    The bundle holds those of one line at a time, in the line's order: each costs memory
    and time in every step, and the order of a sum decides its last bits.
    """
    if loras is None:
        return {}
    weights = dict(lora_adapters.named(text) for text in loras)
    # Compared with the order, since that is part of the sum. A line whose weights alone
    # differ reloads and compiles nothing.
    if list(model.adapters) != list(weights):
        if model.adapters:
            model.unload_adapters()
        for path in weights:
            # Its path is its name, by which the line's weights call it.
            model.load_adapter(path, name=path, weight=0.0)
    return {"adapters": weights}
