"""Guidance around a velocity: branches, interval, schedule, rescale, worse networks.

How branches are combined is the table of guidance_methods.py.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from sd3_jax.diffusion.carried import Carried, Remembering
from sd3_jax.diffusion.checks import choose, require
from sd3_jax.diffusion.guidance_methods import METHODS, Branches, Number
from sd3_jax.diffusion.paths import Batch, Times, expand

Conditional = Callable[[Array, Array, PyTree], Array]
# (x, t, the network's state) -> v_u, v_c and the state
Pair = Callable[[Array, Array, PyTree], tuple[Array, Array, PyTree]]


class Weakened(NamedTuple):
    """A worse velocity that is steered away from: skip-layer guidance, or PAG.

    `velocity` leaves layers out, or perturbs their attention. `scale` multiplies v_c
    minus it while t is in `window`, [low, high]; this costs one more forward a step.
    """

    velocity: Conditional
    scale: Number
    window: tuple[Number, Number]


class Schedule(NamedTuple):
    """A scale over t: `scales` at `times`, which fall, and linear between them."""

    times: Float[np.ndarray | Array, " n"]
    scales: Float[np.ndarray | Array, " n"]


def guided(
    velocity: Conditional | Remembering,
    cond: PyTree,
    uncond: PyTree,
    *,
    scale: Number | Schedule,
    method: str = "cfg",
    options: Mapping[str, Number] | None = None,
    interval: tuple[Number, Number] = (0.0, 1.0),
    rescale: Number = 0.0,
    weakened: Weakened | None = None,
    weak: Conditional | None = None,
    grid: Float[np.ndarray | Array, "*rows n"] | None = None,
) -> Callable[[Array, Array], Array]:
    """The velocity of a method of METHODS while t is in `interval`, else v_c.

    velocity(x, t, cond) is called once, on a doubled batch; for "autoguidance" once,
    and `weak` once. A `scale` that is not an array and at which the method does nothing
    (1 or less for most) means no guidance: one plain call without `uncond` and
    `weakened`.

    `options` replace the method's numbers. The interval is that of Kynkäänniemi et al.
    2024; `rescale` is that of match_std. `weakened` adds its scale times (v_c - v_weak)
    in its window. cfg_zero and cfg_pp read the solver's `grid`. The result of a method
    with a state, or of a velocity that is Remembering, is a Carried, whose state is
    (the method's, the network's). For "cfg" the numbers, without a Schedule, may be
    (b,): one for each row. Raises ConfigError for options out of range, unless they
    are arrays.
    """
    # Traced options are checked before they are traced, by the caller.
    plain = not isinstance(scale, Array | Schedule)
    if plain and not any(isinstance(x, Array) for x in (*interval, rescale)):
        check(scale, interval, rescale)
    row = choose("method", method, METHODS)
    remembers = isinstance(velocity, Remembering)
    if plain and not guides(scale, method):
        return _alone(velocity, cond)
    require(not row.reads_grid or grid is not None, "grid", grid, "that of the solver")
    branches = _branches(row.against, velocity, weak, cond, uncond)
    grid = jnp.zeros(1) if grid is None else jnp.asarray(grid, jnp.float32)

    def step(x: Batch, t: Times, state: PyTree) -> tuple[Batch, PyTree]:
        average, memory = state
        v_u, v_c, memory = branches(x, t, memory)
        with jax.named_scope("guidance"):
            at = Branches(x, expand(t, x), v_c, v_u, grid)
            before = (average,) if row.carries else ()
            strength = _by_row(scale_at(scale, at.t), x)
            v = row.combine(at, strength, *before, **(options or {}))
            inside = expand((t >= interval[0]) & (t <= interval[1]), x)  # by example
            if row.carries:
                v, moved = v
                # Outside, there is nothing to average.
                average = jnp.where(inside, moved, average)
            state = average, memory
            if weakened is None:
                amount = _by_row(rescale, x)
                return jnp.where(inside, match_std(v, v_c, amount), v_c), state
            v = jnp.where(inside, v, v_c)
        with jax.named_scope("skip_guidance"):
            v = v + away(weakened, x, t, cond, v_c)
            # After both differences, because it is the std of their sum that grows.
            return match_std(v, v_c, _by_row(rescale, x)), state

    def initial(x: Batch) -> PyTree:
        average = jnp.zeros_like(x) if row.carries else None
        # The network sees both halves of a doubled batch.
        rows = jnp.concatenate([x, x]) if row.against == "uncond" else x
        return average, velocity.initial(rows) if remembers else None

    if row.carries or remembers:
        return Carried(step, initial)
    return lambda x, t: step(x, t, (None, None))[0]


def _alone(
    velocity: Conditional | Remembering, cond: PyTree
) -> Callable[[Array, Array], Array]:
    """The conditional velocity, without guidance."""
    if not isinstance(velocity, Remembering):
        return lambda x, t: velocity(x, t, cond)

    def step(x: Batch, t: Times, state: PyTree) -> tuple[Batch, PyTree]:
        v, memory = velocity.function(x, t, cond, state[1])
        return v, (None, memory)

    return Carried(step, lambda x: (None, velocity.initial(x)))


def _branches(
    against: str,
    velocity: Conditional | Remembering,
    weak: Conditional | None,
    cond: PyTree,
    uncond: PyTree,
) -> Pair:
    """What is steered away from, v_u, and v_c; in float32."""
    forward = _forward(velocity)
    # float32 before any difference: `scale` multiplies its rounding error.
    require(weak is not None or against != "weak", "weak", weak, "a velocity")
    if against == "weak" and weak is not None:

        def two_networks(x: Batch, t: Times, memory: PyTree):
            # Two calls, because the networks may differ in size: one batch cannot hold
            # both.
            v_u, (v_c, memory) = weak(x, t, cond), forward(x, t, cond, memory)
            return v_u.astype(jnp.float32), v_c.astype(jnp.float32), memory

        return two_networks
    # The unconditional half comes first; it is split again below. The texts are joined
    # here, outside of the solver's loop.
    doubled = jax.tree.map(lambda u, c: jnp.concatenate([u, c]), uncond, cond)

    def doubled_batch(x: Batch, t: Times, memory: PyTree):
        x, t = jnp.concatenate([x, x]), jnp.concatenate([t, t])
        v, memory = forward(x, t, doubled, memory)
        v_u, v_c = jnp.split(v.astype(jnp.float32), 2)
        return v_u, v_c, memory

    return doubled_batch


def _forward(velocity: Conditional | Remembering) -> Callable:
    """(x, t, cond, state) -> (v, state) of either kind of network."""
    if isinstance(velocity, Remembering):
        return velocity.function
    return lambda x, t, cond, state: (velocity(x, t, cond), state)


def away(
    weakened: Weakened, x: Batch, t: Times, cond: PyTree, v_c: Batch
) -> Float[Array, "b ..."]:
    """The difference to a worse velocity, times its scale; 0 outside its window."""
    low, high = weakened.window

    def difference():
        return _by_row(weakened.scale, x) * (
            v_c - weakened.velocity(x, t, cond).astype(jnp.float32)
        )

    # A branch, not a mask: outside the window a third pass would be wasted. All
    # examples of a batch are at the same t, unless they have windows of their own.
    rows = jnp.ndim(low) == 1
    at = t if rows else t[0]
    inside = jnp.logical_and(low <= at, at <= high)
    apart = jax.lax.cond(jnp.any(inside), difference, lambda: jnp.zeros_like(v_c))
    return jnp.where(expand(inside, x), apart, 0) if rows else apart


def _by_row(number: Number, x: Batch) -> Number:
    """A number for each row, (b,), so that it broadcasts against x; or one for all."""
    return expand(jnp.asarray(number), x) if jnp.ndim(number) == 1 else number


def scale_at(scale: Number | Schedule, t: Array) -> Number:
    """The scale at t, or the one of all t."""
    if not isinstance(scale, Schedule):
        return scale
    # interp wants times that rise. Padding repeats the last time, and does no harm.
    return jnp.interp(t, jnp.flip(scale.times), jnp.flip(scale.scales))


def guides(scale: Number, method: str = "cfg") -> bool:
    """Whether a scale asks for guidance: 1 or less means none, as in diffusers.

    The scale of cfg_pp is in [0, 1], and 0 means none.
    """
    # Users of distilled models pass 0 or 1 for "none"; taken literally, 0 would paint
    # the negative prompt.
    return bool(scale > METHODS[method].least)


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
