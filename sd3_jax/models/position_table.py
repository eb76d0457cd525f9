"""Positions of patches: a sin-cos table, extended and cropped (SD3 paper, 5.3.2)."""

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
    """Position embeddings (h * w, d) from the model's stored table, or the formula.

    With `place` (b, 2), one crop for each image: (b, h * w, d).
    """
    # A published file's table counts as it is stored: the formula is not as rounded.
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
    """A crop of h x w from a size x size sin-cos table, as (h * w, width), float32.

    Token i of an axis lies at (i - size/2 + base/2) * 16/base: `base` tokens span the
    16 units of a 256-pixel image, and larger tables extend outward (SD3 paper, sec.
    5.3.2; the released tables of 192 and 384 have base 64). The crop is the centre, or
    for each of b images the one whose top left is `place`. Raises ValueError if it does
    not fit.
    """
    check_part(h, w, size)
    if place is None:
        rows, columns = (axis_table(n, width // 2, size, base) for n in (h, w))
    else:
        # `place` is traced: gather from a constant table of the whole axis.
        whole = axis_table(size, width // 2, size, base)
        rows, columns = (  # (b, h, d/2), (b, w, d/2)
            whole[start[:, None] + jnp.arange(n)] for start, n in zip(place.T, (h, w))
        )
    shape = (*rows.shape[:-2], h, w, width // 2)
    # MAE's code, from which DiT and SD3 have it, puts the x axis in the first half.
    columns = jnp.broadcast_to(columns[..., None, :, :], shape)
    rows = jnp.broadcast_to(rows[..., :, None, :], shape)  # (*b, h, w, d/2)
    return jnp.concatenate([columns, rows], -1).reshape(*shape[:-3], h * w, width)


def crop(
    table: Float[Array, "1 p d"],
    h: int,
    w: int,
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "*b n d"]:
    """The centre h x w of a stored square table, or the crop at `place`: (h * w, d)."""
    size = math.isqrt(table.shape[1])
    check_part(h, w, size)
    table = table.reshape(size, size, -1)
    if place is None:
        top, left = (size - h) // 2, (size - w) // 2
        return table[top : top + h, left : left + w].reshape(h * w, -1)
    # `place` is traced: slices of a size that is static, from a start that is not.
    part = lambda at: jax.lax.dynamic_slice(table, (*at, 0), (h, w, table.shape[-1]))
    return jax.vmap(part)(place).reshape(len(place), h * w, -1)


def check_part(h: int, w: int, size: int) -> None:
    """ValueError if h x w tokens do not fit a table of `size`."""
    if h > size or w > size:
        raise ValueError(
            f"positions: {h}x{w} tokens do not fit a table of {size}x{size};"
            f" raise model.pos_size to {max(h, w)} or more"
        )


def axis_table(n: int, width: int, size: int, base: int) -> Array:
    """(n, width) sin and cos of the middle n positions along one axis."""
    top = (size - n) // 2
    place = (np.arange(top, top + n) - (size - base) // 2) * (16.0 / base)
    # numpy: the table is a constant of the program, computed once.
    frequency = 10000.0 ** -(np.arange(width // 2) / (width // 2))
    angle = place[:, None] * frequency  # float64, as the published table was made
    table = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    return jnp.asarray(table, jnp.float32)
