"""Images for people: pixels from floats, contact sheets, PNG files."""

import io
import itertools
import math

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from sd3_jax.data.images import ASCII, COMMENT
from sd3_jax.errors import ConfigError
from sd3_jax.files import write_whole

PAPER, INK = (255, 255, 255), (72, 76, 84)
TILE, SHEET = 96, 4096  # pixels: a tile's least height and width, a sheet's most width
LINES = 4  # of a caption, at most


def to_uint8(images: Float[ndarray, "*shape"]) -> UInt8[ndarray, "*shape"]:
    """[-1, 1] to 0…255: clipped, and rounded half to even. ConfigError for NaN."""
    pixels = np.asarray(images, np.float32) * 127.5 + 127.5
    if np.isnan(pixels).any():
        bad = np.isnan(pixels).mean()
        raise ConfigError(f"{bad:.1%} of the pixels are NaN: sample in float32")
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def grid(
    images: UInt8[ndarray, "n h w 3"],
    *,
    columns: int | None = None,
    captions: list[str] | None = None,
) -> Image.Image:
    """A contact sheet, row by row; about square by default.

    By default, tiny images are enlarged by a whole factor to tiles of at least 96 px. A
    sheet wider than 4096 px is reduced, but tiles stay at 256 px or more.
    """
    n, h, w = images.shape[:3]
    if captions is not None and len(captions) != n:
        raise ValueError(f"{len(captions)} captions for {n} images")
    columns = min(columns or math.ceil(math.sqrt(n)), n) or 1
    tiles = [_resize(image, _scale(h, w, columns)) for image in images]
    width, height = tiles[0].size if tiles else (TILE, TILE)
    gap = min(max(width // 12, 8), 24)
    font = ImageFont.load_default(min(max(width // 16, 11), 26))
    line = math.ceil(1.3 * font.size)
    texts = [_wrap(text, font, width) for text in captions or [""] * n]
    rows = [range(i, min(i + columns, n)) for i in range(0, n, columns)]
    most = [max(len(texts[i]) for i in row) for row in rows]  # lines of caption
    heights = [height + gap + (k and k * line + gap // 2) for k in most]
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + sum(heights)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, y in zip(rows, itertools.accumulate(heights, initial=gap)):
        for x, i in zip(itertools.count(gap, width + gap), row):
            sheet.paste(tiles[i], (x, y))
            for j, text in enumerate(texts[i]):
                place = x, y + height + gap // 3 + j * line
                draw.text(place, text, fill=INK, font=font)
    return sheet


def enlarged(image: UInt8[ndarray, "h w 3"]) -> Image.Image:
    """A tiny image enlarged by a whole factor to at least 96 px, as on a sheet."""
    return _resize(image, max(1, math.ceil(TILE / min(image.shape[:2]))))


def save_png(
    image: Image.Image | UInt8[ndarray, "h w 3"],
    path: epath.PathLike,
    *,
    info: dict[str, str] | None = None,
) -> None:
    """Write a PNG at any path of epath, complete or not at all.

    `info` becomes the PNG's text chunks.
    """
    write_whole(path, png(image, info=info))


def png(
    image: Image.Image | UInt8[ndarray, "h w 3"], *, info: dict[str, str] | None = None
) -> bytes:
    """A PNG file; `info` becomes its text chunks."""
    image = Image.fromarray(image) if isinstance(image, ndarray) else image
    chunks = PngInfo()
    for name, text in (info or {}).items():
        chunks.add_text(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=chunks)
    return buffer.getvalue()


def lossy(
    image: Image.Image | UInt8[ndarray, "h w 3"],
    suffix: str,
    *,
    quality: int,
    comment: str = "",
) -> bytes:
    """A JPEG or WebP file, by its suffix ".jpg" or ".webp".

    `comment`, in ASCII, becomes EXIF's UserComment. A WebP of quality 100 is lossless.
    """
    image = Image.fromarray(image) if isinstance(image, ndarray) else image
    kind = {".jpg": "jpeg", ".webp": "webp"}[suffix]
    exif = Image.Exif()
    if comment:
        text = ASCII + comment.encode("ascii")
        exif.get_ifd(ExifTags.IFD.Exif)[COMMENT] = text
    options = {"quality": quality, "exif": exif}
    # 4:4:4, as the edges of a painted picture are sharp in colour too.
    options |= {"subsampling": 0} if kind == "jpeg" else {"lossless": quality == 100}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _scale(h, w, columns):
    if min(h, w) < TILE:
        return math.ceil(TILE / min(h, w))
    return min(1.0, max(SHEET / (columns * w), 256 / min(h, w)))


def _resize(image, scale):
    image = Image.fromarray(image)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    whole = float(scale).is_integer()  # then every pixel becomes the same square
    how = Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS
    return image.resize(size, how)


def _wrap(text, font, width):
    """Lines no wider than `width` pixels; longer words, and longer texts, are cut."""
    lines = [""]
    for word in text[: LINES * width].split():  # no glyph is narrower than a pixel
        for piece in _pieces(word, font, width):
            longer = f"{lines[-1]} {piece}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], last.rstrip() + "…"]
    return [line for line in lines if line]


def _pieces(word, font, width):
    while word:
        end = min(len(word), width)
        while end > 1 and font.getlength(word[:end]) > width:
            end -= 1
        yield word[:end]
        word = word[end:]
