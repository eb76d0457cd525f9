"""Checks callers' pictures, masks and latents and converts them to floats.

PIL images follow the rules of the data path (data/images.py): upright by their EXIF,
transparency over white, sixteen bits rounded to eight. Traced arrays are checked by
shape and dtype only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from PIL import Image

from sd3_jax.data import images as files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

Pictures = Any  # an array, a PIL image, or a sequence of these
# One step of bfloat16 above 1: what a decoder in that dtype, or resampling, leaves
# beyond the range. It is clipped; values farther out are of another range.
SLACK = 2.0**-7
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MASKS = ("1", "L", "I;16")  # PIL's modes of one channel


def pixels(pictures: Pictures, name: str = "image") -> Float[Array | np.ndarray, "..."]:
    """(b, H, W, 3) in [0, 1] of bytes, floats in [0, 1] or PIL images.

    One picture is a batch of one; grey ones become RGB and alpha goes over white.
    """
    x = _together(pictures, name, files.pixels, _pictures)
    x = _floats(x, name, certain=_are_decoded(pictures))
    # (b, H, W, 1) → (b, H, W, 3)
    if x.shape[-1] == 1:
        return x.repeat(3, axis=-1)
    if x.shape[-1] == 4:
        # Over white, as the readers of training data do.
        alpha = x[..., 3:]
        return x[..., :3] * alpha + (1 - alpha)
    return x


def mask(masks: Pictures, name: str = "mask") -> Float[np.ndarray, "b H W 1"]:
    """In [0, 1], of bytes (255 is 1), booleans, floats in [0, 1] or PIL images."""
    x = np.asarray(_together(masks, name, _one_channel, _masks))
    return _floats(x, name)


def pixel_mask(
    masks: Pictures, shape: tuple, factor: int
) -> Float[np.ndarray, "b H W 1"]:
    """A mask over the pixels of latents of `shape`; UserError for another size."""
    x = mask(masks)
    # Not resized: where the border of a repainted area runs is the caller's choice.
    sides = shape[0] * factor, shape[1] * factor
    if x.shape[1:3] != sides:
        raise UserError(
            f"mask of {x.shape[1:3]} pixels: must equal the size of the picture,"
            f" {sides}"
        )
    return x


def latent_mask(
    masks: Pictures, shape: tuple, factor: int
) -> Float[np.ndarray, "b h w 1"]:
    """1 where the mask is at least 0.5 at the first pixel of each latent."""
    # Binary, and by the first pixel, as PyTorch's nearest interpolation shrinks a mask.
    at_latents = pixel_mask(masks, shape, factor)[:, ::factor, ::factor]
    return (at_latents >= 0.5).astype(np.float32)


def latents(
    value: Any, channels: int, name: str = "latents"
) -> Float[Array | np.ndarray, "b h w c"]:
    """A caller's latents, float32 and finite; one picture's are a batch of one."""
    x = laid_out(value, channels, name)
    finite(x, name)
    return x.astype(np.float32)


def laid_out(
    value: Any, channels: int, name: str = "latents"
) -> Float[Array | np.ndarray, "b h w c"]:
    """Latents of any values, channels last."""
    x = _array(value, name)
    # One picture's latents become a batch of one.
    if x.ndim == 3 and x.shape[-1] == channels:
        x = x[None]
    if x.ndim != 4 or x.shape[-1] != channels or not all(x.shape):
        raise UserError(
            f"{name} of shape {tuple(x.shape)}: expected (b, h, w, {channels})"
            f"{_transposed(x, (channels,))}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(f"{name} of dtype {x.dtype}: expected floats")
    return x


def times(t: Any, rows: int) -> Float[Array | np.ndarray, " b"]:
    """Times in [0, 1], one for each row or one for all."""
    # Times stay float32: bfloat16 has 8 bits, too few for 1000 t.
    t = jnp.asarray(t, jnp.float32)
    if t.ndim > 1 or t.size not in (1, rows):
        raise UserError(
            f"t of shape {t.shape}: expected one for each of {rows} latents"
        )
    if not isinstance(t, jax.core.Tracer) and not bool(((0 <= t) & (t <= 1)).all()):
        raise UserError(
            f"t from {float(t.min()):g} to {float(t.max()):g}: expected 0 (data) to 1"
            " (noise), diffusers' timesteps / 1000"
        )
    return jnp.broadcast_to(t, (rows,))


# --- checks


def are_latents(value: Any, channels: int) -> bool:
    """Whether an array has latents' channels, be they the last or, wrongly, first."""
    # Latents in PyTorch's layout, channels first, are recognised as well, so that
    # laid_out can say how to transpose them.
    shape = () if isinstance(value, list | tuple) else getattr(value, "shape", ())
    if len(shape) < 3 or shape[-1] in CHANNELS:
        return False
    return shape[-1] == channels or shape[-3] == channels


def finite(x: Array | np.ndarray, name: str) -> None:
    """UserError where values are NaN or infinite."""
    if not isinstance(x, jax.core.Tracer) and not bool(_module(x).isfinite(x).all()):
        raise UserError(f"{name}: holds values that are NaN or infinite")


# --- one batch from arrays, PIL images and lists


def _together(value: Pictures, name: str, read: Callable, shaped: Callable):
    """One batch; `read` makes an array of a PIL image, `shaped` gives it four axes."""
    if isinstance(value, Image.Image):
        # MPO is what cameras write: a JPEG with a second frame that nobody means.
        if getattr(value, "is_animated", False) and value.format != "MPO":
            raise UserError(f"{name}: animated; pass one frame of it, frame.copy()")
        # Their values have no fixed range or are no RGB colours: the caller has to
        # choose.
        if value.mode in ("F", "I", "HSV", "I;16B"):
            raise UserError(
                f'{name} of mode {value.mode}: pass x.convert("RGB"); for depth, pass'
                " numpy.asarray(x) scaled to floats from 0 to 1"
            )
        return shaped(read(value, name), name)
    if not isinstance(value, list | tuple):
        return shaped(_array(value, name), name)
    parts = [_together(x, f"{name} {i}", read, shaped) for i, x in enumerate(value)]
    if not parts:
        raise UserError(f"{name}: an empty list; expected at least one")
    # No resizing and no casting in silence: a list must agree in size and dtype.
    if len({(x.dtype, x.shape[1:]) for x in parts}) > 1:
        kinds = ", ".join(f"{x.dtype} {x.shape[1:]}" for x in parts[:8])
        raise UserError(f"{name}: {kinds}; expected all of one size and dtype")
    return parts[0] if len(parts) == 1 else _module(*parts).concatenate(parts)


def _array(value: Any, name: str) -> Array | np.ndarray:
    # Arrays of jax stay on their device.
    if isinstance(value, np.ndarray | jax.Array):
        return value
    if not hasattr(value, "__array__"):
        raise UserError(
            f"{name}: {shown(repr(value))}: expected an array or a PIL image; for a"
            " file, pass PIL.Image.open(path)"
        )
    try:
        return np.asarray(value)  # PyTorch's, on the host
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: not a NumPy array: {shown(error, 160)}") from None


def _module(*arrays):
    return jnp if any(isinstance(x, jax.Array) for x in arrays) else np


def _pictures(x: Array | np.ndarray, name: str):
    # (H, W) → (1, H, W, 1), a grey picture
    batch = x[None, ..., None] if x.ndim == 2 else x
    batch = batch[None] if batch.ndim == 3 and batch.shape[-1] in CHANNELS else batch
    if batch.ndim != 4 or batch.shape[-1] not in CHANNELS or not all(batch.shape):
        raise UserError(
            f"{name} of shape {tuple(x.shape)}: expected (b, H, W, 3), (H, W, 3) or (H,"
            f" W){_transposed(x, CHANNELS)}"
        )
    return batch


def _masks(x: Array | np.ndarray, name: str):
    # (H, W) → (1, H, W); channels follow below.
    batch = x[None] if x.ndim == 2 else x
    if batch.ndim == 3 and batch.shape[-1] in CHANNELS[1:]:
        raise UserError(
            f"{name} of shape {tuple(x.shape)}: expected one channel, x[..., 0]"
        )
    if batch.ndim == 3:
        batch = batch[None] if batch.shape[-1] == 1 else batch[..., None]
    if batch.ndim != 4 or batch.shape[-1] != 1 or not all(batch.shape):
        raise UserError(
            f"{name} of shape {tuple(x.shape)}: expected (b, H, W, 1), (b, H, W) or (H,"
            f" W){_transposed(x, (1,))}"
        )
    return batch


def _transposed(x: Array | np.ndarray, channels: tuple[int, ...]) -> str:
    """How to transpose an array whose channels come first, as in PyTorch."""
    first = x.ndim in (3, 4) and x.shape[-3] in channels
    axes = "0, 2, 3, 1" if x.ndim == 4 else "1, 2, 0"
    return f"; channels come last here, x.transpose({axes})" if first else ""


def _one_channel(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode not in MASKS:
        raise UserError(
            f'{name} of mode {picture.mode}: expected "1" or "L"; pass'
            ' mask.convert("L"), or mask.getchannel("A") for the opaque area'
        )
    return files.pixels(picture, name)[..., :1]


def _are_decoded(value: Pictures) -> bool:
    """Whether all are PIL images, whose bytes are of eight bits: 1 is nearly black."""
    if isinstance(value, list | tuple):
        return all(map(_are_decoded, value))
    return isinstance(value, Image.Image)


def _floats(x: Array | np.ndarray, name: str, *, certain: bool = False):
    """Bytes divided by 255, booleans as 0 and 1, floats in [0, 1] unchanged.

    UserError for bytes of 0 and 1, unless it is `certain` that 255 stands for 1.
    """
    if x.dtype == bool:
        return x.astype(np.float32)
    if x.dtype == np.uint8:
        # A mask of 0 and 1 in bytes would be black: 1 is 1/255.
        known = certain or isinstance(x, jax.core.Tracer)
        if not known and any(row.max() == 1 for row in x):
            raise UserError(
                f"{name}: bytes of 0 and 1, but 255 stands for 1; pass x.astype(bool),"
                " or bytes of 0 and 255"
            )
        return x.astype(np.float32) / 255
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise UserError(
            f"{name} of dtype {x.dtype}: expected uint8, or floats from 0 to 1"
        )
    x = x.astype(np.float32)
    finite(x, name)
    if not isinstance(x, jax.core.Tracer):
        low, high = float(x.min()), float(x.max())
        # Values in [-1, 1] or [0, 255] would pass the program and give wrong pictures.
        if not -SLACK <= low <= high <= 1 + SLACK:
            raise UserError(
                f"{name}: floats from {low:g} to {high:g}; expected 0 to 1: x / 255 of"
                " 0 to 255, (x + 1) / 2 of -1 to 1, else x.clip(0, 1)"
            )
    return x.clip(0, 1)
