"""Solvers of dx = v(x, t) dt from grid[0] to grid[-1], each one scan over the grid.

All take (velocity, x, grid), hold x in float32 and return it at grid[-1], which at
t = 0 is the x0 estimate; or, asked for the trajectory, x at every t of the grid.
Only dpmpp_2m looks at the path. None evaluates the velocity at t = 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd3_jax.diffusion.paths import RF, Batch, Path

Velocity = Callable[[Array, Array], Array]
Grid = Float[Array | np.ndarray, " n"]
Solution = Batch | Float[Array, "n b ..."]


def euler(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
) -> Solution:
    def step(x, _, t, t_next):
        return x + (t_next - t) * velocity(x, _times(t, x)), None

    grid = jnp.asarray(grid, jnp.float32)
    return _scan(step, x, None, (grid[:-1], grid[1:]), trajectory)


def heun(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
) -> Solution:
    """Second order by the mean slope; a step to t = 0 is Euler's."""

    def step(x, _, t, t_next):
        dt = t_next - t
        v = velocity(x, _times(t, x)).astype(jnp.float32)
        v_next = jax.lax.cond(
            t_next > 0,
            lambda: velocity(x + dt * v, _times(t_next, x)).astype(jnp.float32),
            lambda: v,
        )
        return x + dt * (v + v_next) / 2, None

    grid = jnp.asarray(grid, jnp.float32)
    return _scan(step, x, None, (grid[:-1], grid[1:]), trajectory)


def dpmpp_2m(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
) -> Solution:
    """DPM-Solver++(2M) (Lu et al. 2022) as the released code has it.

    The x0 estimate is extrapolated in lambda = -log b_t (not log a_t / b_t), except in
    the first step and in one to t = 0. Second order where lambda's steps are small.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)
    keep = b[1:] / b[:-1]
    gain = a[1:] - keep * a[:-1]
    h = -jnp.diff(jnp.log(jnp.where(b > 0, b, 1)))  # a last one to b = 0 is not used
    slope = jnp.where(b[2:] > 0, h[1:] / (2 * h[:-1]), 0)
    slope = jnp.pad(slope, (1, 0))

    def step(x, x0_last, t, keep, gain, slope):
        t = _times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return keep * x + gain * (x0 + slope * (x0 - x0_last)), x0

    x0_last = jnp.zeros(x.shape, jnp.float32)
    return _scan(step, x, x0_last, (grid[:-1], keep, gain, slope), trajectory)


SOLVERS = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def _scan(step, x, memory, steps, trajectory):
    """(x, memory) = step(x, memory, *s) for each s of steps."""

    def body(carry, s):
        x, memory = step(*carry, *s)
        return (x, memory), x if trajectory else None

    x = x.astype(jnp.float32)
    (last, _), xs = jax.lax.scan(body, (x, memory), steps)
    return jnp.concatenate([x[None], xs]) if trajectory else last


def _times(t, x):
    return jnp.full(x.shape[:1], t)  # (b,)
