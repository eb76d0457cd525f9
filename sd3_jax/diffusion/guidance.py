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

Number = float | int | np.ndarray | np.number | Array


class Skip(NamedTuple):
    """Skip-layer guidance: `velocity` leaves layers out, and is steered away from.

    `scale` multiplies the difference while t is in `window`, [low, high].
    """

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
    """A guided velocity: v_u + scale (v_c - v_u) while t is in `interval`, else v_c.

    velocity(x, t, cond) is called once, on a doubled batch. A `scale` of 1 or less that
    is not an array means no guidance: one plain call without `uncond` and `skip`. The
    interval is that of Kynkäänniemi et al. 2024; `rescale` is that of match_std. `skip`
    adds its scale times (v_c - v_skip) in its window. Raises ConfigError for options
    out of range, unless they are arrays.
    """
    start, stop = interval
    # Traced options are checked before they are traced, by the caller.
    if not any(isinstance(x, Array) for x in (scale, start, stop, rescale)):
        check(scale, interval, rescale)
    if not isinstance(scale, Array) and not guides(scale):
        return lambda x, t: velocity(x, t, cond)
    # The unconditional half comes first; it is split again below.
    condition = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def guided(x: Batch, t: Times) -> Batch:
        v = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), condition)
        with jax.named_scope("guidance"):
            # float32 before the difference: `scale` multiplies its rounding error.
            v_u, v_c = jnp.split(v.astype(jnp.float32), 2)
            v = match_std(v_u + scale * (v_c - v_u), v_c, rescale)
            v = jnp.where(expand((t >= start) & (t <= stop), x), v, v_c)  # by example
        if skip is None:
            return v
        with jax.named_scope("skip_guidance"):
            return v + away(skip, x, t, v_c)

    def away(skip: Skip, x: Batch, t: Times, v_c: Batch) -> Batch:
        low, high = skip.window
        # A branch, not a mask: outside the window a third pass would be wasted. All
        # examples of a batch are at the same t.
        return jax.lax.cond(
            (low <= t[0]) & (t[0] <= high),
            lambda: skip.scale * (v_c - skip.velocity(x, t, cond).astype(jnp.float32)),
            lambda: jnp.zeros_like(v_c),
        )

    return guided


def guides(scale: Number) -> bool:
    """Whether a scale asks for guidance: 1 or less means none, as in diffusers."""
    # Users of distilled models pass 0 or 1 for "none"; taken literally, 0 would paint
    # the negative prompt.
    return bool(scale > 1)


def check(
    scale: Number, interval: tuple[Number, Number] = (0.0, 1.0), rescale: Number = 0.0
) -> None:
    """Raise a ConfigError that names the option out of range."""
    start, stop = interval
    require(math.isfinite(scale), "scale", scale, "a finite number")
    ordered = bool(0 <= start <= stop <= 1)
    require(ordered, "interval", interval, "0 <= start <= stop <= 1")
    require(bool(0 <= rescale <= 1), "rescale", rescale, "a number in [0, 1]")


def match_std(v: Batch, v_c: Batch, amount: Number) -> Batch:
    """v with its std moved towards that of v_c (Lin et al. 2023, sec. 3.4).

    `amount` is 0 for v as it is, 1 for the std of v_c.
    """
    # On the network's output, here the velocity, as diffusers' rescale_noise_cfg does,
    # and not on x0.
    axes = tuple(range(1, v.ndim))
    std, std_c = (jnp.std(a, axis=axes, keepdims=True) for a in (v, v_c))  # (b, 1, …)
    ratio = jnp.where(std > 0, std_c / std, 1)  # a network at initialisation returns 0
    return ratio * amount * v + v * (1 - amount)
