"""The autoencoder tile by tile, for pictures whose activations exceed the memory.

Tiles, overlaps and blends are those of diffusers' `AutoencoderKL.enable_tiling`. Each
tile is normalised and attends on its own, so results differ from those of the whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sd3_jax.errors import ConfigError

OVERLAP = 0.25  # of a tile's side, with the next tile


def encode(
    run: Callable[[Array], Array],
    images: Float[Array, "b H W 3"],
    *,
    tile: int,
    factor: int,
) -> Float[Array, "b h w k"]:
    """Moments of images; `run` maps tiles (b, H, W, 3) to (b, H/factor, W/factor, k).

    A tile is `tile` pixels high and wide, of which `factor` lie along a latent's side.
    """
    size, stride = _in_latents(tile, factor)
    # One tile is the whole picture: no seam, and the same result as without tiling.
    if max(images.shape[1:3]) <= tile:
        return run(images)
    # Cut in pixels, joined in latents.
    parts = _parts(run, images, factor * size, factor * stride)
    return _join(parts, size - stride, stride)


def decode(
    run: Callable[[Array], Array],
    latents: Float[Array, "b h w c"],
    *,
    tile: int,
    factor: int,
) -> Float[Array, "b H W 3"]:
    """Images of latents; `run` maps (b, h, w, c) to (b, factor*h, factor*w, 3)."""
    size, stride = _in_latents(tile, factor)
    if max(latents.shape[1:3]) <= size:
        return run(latents)
    # Cut in latents, joined in pixels.
    parts = _parts(run, latents, size, stride)
    return _join(parts, factor * (size - stride), factor * stride)


def _in_latents(tile, factor):
    """The side of a tile and the stride between tiles, in latents."""
    # A tile must cover whole latents, or its neighbours would not meet.
    if tile < factor or tile % factor:
        raise ConfigError(f"tile {tile}: expected a multiple of {factor}")
    size = tile // factor
    # Where this rounds, diffusers gives pictures of a wrong size: nothing to equal.
    return size, size - int(size * OVERLAP)


def _parts(run, x, size, stride):
    """The outputs of all tiles as rows; tiles at the far edges are smaller."""
    height, width = x.shape[1:3]
    rows = [[(i, j) for j in range(0, width, stride)] for i in range(0, height, stride)]
    # Tiles at the right and lower edges are smaller. Grouping tiles by shape keeps the
    # program small: it has the autoencoder once for each shape.
    alike = {}  # corners by the shape of their tiles
    for i, j in sum(rows, []):
        shape = min(size, height - i), min(size, width - j)
        alike.setdefault(shape, []).append((i, j))
    done = {}
    for shape, corners in alike.items():
        done |= zip(corners, _in_turn(run, x, shape, corners))
    return [[done[corner] for corner in row] for row in rows]


def _in_turn(run, x, shape, corners):
    """(n, b, h, w, k): tiles of one shape, one after another in one loop."""
    b, _, _, c = x.shape

    def one(corner):
        # The corner is traced and the size static: one slice operation serves all
        # corners.
        return run(jax.lax.dynamic_slice(x, (0, *corner, 0), (b, *shape, c)))

    # lax.map is a sequential loop; vmap would hold the activations of all tiles at
    # once.
    return jax.lax.map(one, jnp.array(corners))


def _join(parts, overlap, keep):
    """The whole picture; each part is blended with its blended neighbours."""
    rows, above = [], None
    for row in parts:
        done = []
        for j, part in enumerate(row):
            if above:
                # Blended with the upper neighbour first and then with the left one,
                # which is itself blended: diffusers' order, on which the corner of four
                # tiles depends.
                part = _blend(above[j], part, overlap, axis=1)
            if done:
                part = _blend(done[-1], part, overlap, axis=2)
            done.append(part)
        # Each tile keeps `keep` lines; the overlap behind them is in the next tile's
        # blend.
        rows.append(jnp.concatenate([p[:, :keep, :keep] for p in done], axis=2))
        above = done
    return jnp.concatenate(rows, axis=1)


def _blend(before, after, overlap, axis):
    """`after`, with its first `overlap` lines faded in over the last of `before`."""
    n = min(overlap, before.shape[axis], after.shape[axis])
    # n may be less than the overlap: tiles at the far edges can be thinner than it.
    _, end = jnp.split(before, [before.shape[axis] - n], axis)
    start, rest = jnp.split(after, [n], axis)
    # Starts at 0 and ends below 1, as diffusers' y / overlap does.
    ramp = (jnp.arange(n) / n).reshape(-1, *[1] * (after.ndim - 1 - axis))
    return jnp.concatenate([(1 - ramp) * end + ramp * start, rest], axis)
