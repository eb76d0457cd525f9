"""Classifier-free guidance (Ho & Salimans 2022) as a map of velocities."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from sd3_jax.diffusion.checks import require
from sd3_jax.diffusion.paths import Batch, Times, expand

Number = float | int | np.ndarray | np.generic | Array


class Skip(NamedTuple):
    """Skip-layer guidance: `velocity` with layers left out, steered away from by
    `scale` while t is in `window`."""

    velocity: Callable[[Array, Array, PyTree], Array]
    scale: Number
    window: tuple[Number, Number]


def cfg(
    velocity: Callable[[Array, Array, PyTree], Array],
    cond: PyTree,
    uncond: PyTree,
    *,
    scale: Number,
    interval: tuple[Number, Number] = (0.0, 1.0),
    rescale: Number = 0.0,
    skip: Skip | None = None,
) -> Callable[[Array, Array], Array]:
    """v_u + scale (v_c - v_u) while t is in `interval`, else v_c.

    One call of velocity(x, t, cond) on a doubled batch, uncond first. A scale of 1 or
    less that is no array is no guidance at all, as everywhere else: one plain call, and
    `uncond` and `skip` are not looked at. The interval is that of Kynkäänniemi et al.
    2024. `skip` adds its scale times (v_c - v_skip) while its window is open.
    """
    start, stop = interval
    if not any(isinstance(x, Array) for x in (scale, start, stop, rescale)):
        check(scale, interval, rescale)
    if not isinstance(scale, Array) and not guides(scale):
        return lambda x, t: velocity(x, t, cond)
    condition = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def guided(x: Batch, t: Times) -> Batch:
        v = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), condition)
        with jax.named_scope("guidance"):
            v_u, v_c = jnp.split(v.astype(jnp.float32), 2)
            v = match_std(v_u + scale * (v_c - v_u), v_c, rescale)
            v = jnp.where(expand((start <= t) & (t <= stop), x), v, v_c)
        if skip is None:
            return v
        with jax.named_scope("skip_guidance"):
            return v + away(skip, x, t, v_c)

    def away(skip: Skip, x: Batch, t: Times, v_c: Batch) -> Batch:
        low, high = skip.window
        return jax.lax.cond(  # all examples are at the same t
            (low <= t[0]) & (t[0] <= high),
            lambda: skip.scale * (v_c - skip.velocity(x, t, cond).astype(jnp.float32)),
            lambda: jnp.zeros_like(v_c),
        )

    return guided


def guides(scale: Number) -> bool:
    """Whether a scale asks for guidance: from 1 down diffusers' pipelines, and the
    users of models that are distilled from it, mean none by it."""
    return bool(scale > 1)


def check(
    scale: Number, interval: tuple[Number, Number] = (0.0, 1.0), rescale: Number = 0.0
) -> None:
    """A ConfigError that names the option out of range."""
    start, stop = interval
    require(math.isfinite(scale), "scale", scale, "a finite number")
    ordered = 0 <= start <= stop <= 1
    require(ordered, "interval", interval, "0 <= start <= stop <= 1")
    require(0 <= rescale <= 1, "rescale", rescale, "a number in [0, 1]")


def match_std(v: Batch, v_c: Batch, amount: Number) -> Batch:
    """v brought towards the std of v_c (Lin et al. 2023, 3.4).

    In the space of velocities, not x0: it is the network's output, as in their code.
    """
    axes = tuple(range(1, v.ndim))
    std, std_c = (jnp.std(a, axis=axes, keepdims=True) for a in (v, v_c))
    ratio = jnp.where(std > 0, std_c / std, 1)  # an untrained network answers 0
    return amount * ratio * v + (1 - amount) * v
