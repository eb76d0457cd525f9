"""Reading pictures to RGB: JPEG, PNG and WebP, with limits checked before decoding.

Each of Pillow's modes has its rule; a mode without one is refused. Colour profiles are
not applied.
"""

import io
import re
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from numpy import ndarray
from PIL import ExifTags, Image, ImageFile

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

FORMATS = ("JPEG", "PNG", "WEBP")
COMMENT = ExifTags.Base.UserComment
ASCII = b"ASCII\0\0\0"  # EXIF's name of the comment's encoding, before its text
# Limits. A file of a few kB can decode to gigabytes; headers are enough to refuse it.
BYTES = 2**27  # of a file
PIXELS = 2**26  # 8192 x 8192
SIDE = 16  # pixels, at least: one token is 8 of the autoencoder times a patch of 2
ASPECT = 8  # at most: a crop to a bucket would lose most of what a caption describes
SCANS = 256  # of a progressive JPEG, which has about ten; each costs a whole pass
UPRIGHT = {  # by EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """A rejected picture: where it is, what it is, and what is allowed."""


def read(
    source: bytes | epath.PathLike, where: str = "image"
) -> UInt8[ndarray, "h w 3"]:
    """Read a picture, upright and in RGB, transparency over white; or a BadImage.

    `where` names bytes in messages; a path names itself.
    """
    if not isinstance(source, bytes):
        where, source = str(source), read_bytes(source)
    picture = open_header(source, where)
    width, height = picture.size
    if min(width, height) < SIDE or max(width, height) > ASPECT * min(width, height):
        raise BadImage(
            f"{_at(where)}: {width} x {height} pixels; expected sides of {SIDE} or more"
            f" and at most {ASPECT}:1"
        )
    return pixels(picture, where)


def read_own(path: epath.PathLike) -> tuple[UInt8[ndarray, "h w 3"], dict[str, str]]:
    """Read a picture of this package, of any shape, and its texts; or a BadImage.

    A JPEG or WebP has the text "sd3_jax" alone, in EXIF's UserComment.
    """
    picture = open_header(read_bytes(path), str(path))
    array = pixels(picture, str(path))
    if picture.format == "PNG":
        return array, dict(picture.text)
    try:
        comment = picture.getexif().get_ifd(ExifTags.IFD.Exif)[COMMENT]
        text = bytes(comment).removeprefix(ASCII).decode("ascii")
    except Exception:  # no EXIF, or another program's, which may be broken
        return array, {}
    return array, {"sd3_jax": text}


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """(height, width) of an opened picture once it is turned as its EXIF says."""
    turned = _orientation(picture) >= 5
    return picture.size if turned else picture.size[::-1]


def open_header(
    data: bytes, where: str = "image", formats: Sequence[str] = FORMATS
) -> Image.Image:
    """Open a picture and check its size and format, without decoding it."""
    if len(data) > BYTES:
        raise BadImage(f"{_at(where)}: {len(data)} bytes; expected at most {BYTES}")
    try:
        picture = Image.open(io.BytesIO(data), formats=tuple(formats))
    # MemoryError says nothing about the picture: it must not be rejected for good.
    except MemoryError:
        raise
    except Exception as error:  # a damaged header can raise most things
        kind = f"not one of {', '.join(formats)}, or damaged"
        bomb = re.sub(r".*?(\d+ pixels).*", r"\1", str(error))  # as we say it below
        unidentified = isinstance(error, Image.UnidentifiedImageError)
        is_bomb = isinstance(error, Image.DecompressionBombError)
        reason = kind if unidentified else bomb if is_bomb else error
        raise _bad(where, reason) from None
    if picture.width * picture.height > PIXELS:
        raise _bad(where, f"{picture.width} x {picture.height} pixels")
    # A JPEG that holds several pictures (MPO) begins with the photograph itself.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise _bad(where, f"animated, {picture.n_frames} frames")
    scans = data.count(b"\xff\xda") if picture.format in ("JPEG", "MPO") else 0
    if scans > SCANS:
        raise _bad(where, f"a JPEG of {scans} scans, too many to decode")
    return picture


def pixels(picture: Image.Image, where: str = "image") -> UInt8[ndarray, "h w 3"]:
    """Decode an opened picture, turn it as its EXIF says and convert it to RGB."""
    # A global of Pillow's: other libraries set it, and half a picture would be grey.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        picture.load()
    except MemoryError:
        raise
    except Exception as error:  # so can damaged data
        cut = "truncated" in str(error).lower()  # by Pillow's readers in many words
        raise _bad(where, "truncated" if cut else error) from None
    if picture.mode not in TO_RGB:
        raise _bad(where, f"of mode {picture.mode}, which is not supported")
    upright = UPRIGHT.get(_orientation(picture))
    rgb = TO_RGB[picture.mode](picture)
    return np.array(rgb if upright is None else rgb.transpose(upright))


def read_bytes(path: epath.PathLike) -> bytes:
    """A picture's file, or as much of it as tells that it is too large."""
    try:
        files.require_regular(path)
        with epath.Path(path).open("rb") as file:
            return file.read(BYTES + 1)
    except UserError as error:
        raise BadImage(shown(error, 4200)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        reason = getattr(error, "strerror", None) or error
        raise BadImage(f"{_at(path)}: cannot be read: {shown(reason)}") from None


def _at(where) -> str:
    """A path for a message, long enough to keep its end, the file's name."""
    return shown(where, 4096)


def _bad(where, reason) -> BadImage:
    reason = str(reason) or type(reason).__name__
    return BadImage(
        f"{_at(where)}: {shown(reason, 120)}; expected a whole JPEG, PNG or WebP, not"
        f" animated, of at most {PIXELS >> 20} megapixels"
    )


def _orientation(picture) -> int:
    try:
        return picture.getexif().get(0x0112, 1)
    except Exception:  # many photographs have broken EXIF; then as it is stored
        return 1


# Conversions by mode. Pillow's own would clip sixteen bits and drop alpha silently.


def _opaque(picture):
    """Convert a mode without alpha; one colour may be transparent (PNG's tRNS)."""
    key = picture.info.get("transparency")
    if key is None:
        return picture.convert("RGB")
    return _over_white(picture.convert("RGBA"))


def _over_white(picture):
    rgba = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return white


def _sixteen_bits(picture):
    values = np.asarray(picture).astype(np.uint32)
    # 65535 is 257 * 255: rounded to the nearest of 8 bits.
    grey = ((values + 128) // 257).astype(np.uint8)
    grey[values == picture.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


TO_RGB = {
    **dict.fromkeys(("1", "L", "P", "RGB"), _opaque),
    **dict.fromkeys(("LA", "PA", "RGBA"), _over_white),
    # Inverted in every JPEG, as Adobe writes it; Pillow reads it so, as browsers do.
    "CMYK": lambda picture: picture.convert("RGB"),
    "YCbCr": lambda picture: picture.convert("RGB"),
    "I;16": _sixteen_bits,
}
