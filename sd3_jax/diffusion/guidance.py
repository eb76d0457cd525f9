"""Classifier-free guidance (Ho & Salimans 2022) as a map of velocities."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from sd3_jax.diffusion.checks import require
from sd3_jax.diffusion.paths import Batch, Times, expand


def cfg(
    velocity: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    uncond: PyTree,
    *,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Callable[[Array, Array], Array]:
    """v_u + scale (v_c - v_u) while t is in `interval`, else v_c.

    One call of velocity(x, t, cond) on a doubled batch, uncond first; at scale 1 a
    plain one. The interval is that of Kynkäänniemi et al. 2024.
    """
    start, stop = interval
    require(math.isfinite(scale), "scale", scale, "a finite number")
    require(0 <= start <= stop <= 1, "interval", interval, "0 <= start <= stop <= 1")
    require(0 <= rescale <= 1, "rescale", rescale, "a number in [0, 1]")
    if scale == 1:
        return lambda x, t: velocity(x, t, cond)
    both = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def guided(x: Batch, t: Times) -> Batch:
        v = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        v_u, v_c = jnp.split(v.astype(jnp.float32), 2)
        v = match_std(v_u + scale * (v_c - v_u), v_c, rescale)
        return jnp.where(expand((start <= t) & (t <= stop), x), v, v_c)

    return guided


def match_std(v: Batch, v_c: Batch, amount: float) -> Batch:
    """v brought towards the std of v_c (Lin et al. 2023, 3.4).

    In the space of velocities, not x0: it is the network's output, as in their code.
    """
    axes = tuple(range(1, v.ndim))
    std, std_c = (jnp.std(a, axis=axes, keepdims=True) for a in (v, v_c))
    ratio = jnp.where(std > 0, std_c / std, 1)  # an untrained network answers 0
    return amount * ratio * v + (1 - amount) * v
