"""Where each patch lies: a sin-cos table, extended and cropped (SD3 paper, 5.3.2)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int


def position_table(
    model: nn.Module, h: int, w: int, place: Int[Array, "b 2"] | None = None
) -> Float[Array, "*b n d"]:
    """A part of the table that the model's variables hold, else by its formula."""
    if not model.has_variable("buffers", "pos_embed"):
        shape = dict(size=model.pos_size, base=model.pos_base)
        return positions(h, w, model.width, place=place, **shape)
    return crop(model.get_variable("buffers", "pos_embed"), h, w, place)


def positions(
    h: int,
    w: int,
    width: int,
    *,
    size: int,
    base: int,
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "*b n d"]:
    """A part h x w of a size x size sin-cos table, as (h * w, width), float32.

    Along each axis the table's tokens lie at (i - size/2 + base/2) * 16/base: `base`
    of them span 16 units, those of a 256-pixel image, and larger tables extend outward
    (SD3 paper, sec. 5.3.2; the released 192 and 384 tables have base 64). The part is
    its centre; or for each of b images the one whose top and left `place` gives.
    """
    check_part(h, w, size)
    if place is None:
        rows, columns = (axis_table(n, width // 2, size, base) for n in (h, w))
    else:
        whole = axis_table(size, width // 2, size, base)
        rows, columns = (
            whole[start[:, None] + jnp.arange(n)] for start, n in zip(place.T, (h, w))
        )
    shape = (*rows.shape[:-2], h, w, width // 2)
    columns = jnp.broadcast_to(columns[..., None, :, :], shape)  # x comes first
    rows = jnp.broadcast_to(rows[..., :, None, :], shape)
    return jnp.concatenate([columns, rows], -1).reshape(*shape[:-3], h * w, width)


def crop(
    table: Float[Array, "1 p d"],
    h: int,
    w: int,
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "*b n d"]:
    """The centre h x w of a stored square table, or where `place` says: (h * w, d)."""
    size = math.isqrt(table.shape[1])
    check_part(h, w, size)
    table = table.reshape(size, size, -1)
    if place is None:
        top, left = (size - h) // 2, (size - w) // 2
        return table[top : top + h, left : left + w].reshape(h * w, -1)
    part = lambda at: jax.lax.dynamic_slice(table, (*at, 0), (h, w, table.shape[-1]))
    return jax.vmap(part)(place).reshape(len(place), h * w, -1)


def check_part(h: int, w: int, size: int) -> None:
    if h > size or w > size:
        raise ValueError(
            f"positions: {h}x{w} tokens do not fit a table of {size}x{size};"
            f" raise model.pos_size to {max(h, w)} or more"
        )


def axis_table(n: int, width: int, size: int, base: int) -> Array:
    top = (size - n) // 2
    place = (np.arange(top, top + n) - (size - base) // 2) * (16.0 / base)
    frequency = 10000.0 ** -(np.arange(width // 2) / (width // 2))
    angle = place[:, None] * frequency  # float64, as the published table was made
    table = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    return jnp.asarray(table, jnp.float32)
