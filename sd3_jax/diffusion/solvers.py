"""Solvers of dx = v(x, t) dt from grid[0] to grid[-1], each one scan over the grid.

All take (velocity, x, grid), hold x in float32 and return it at grid[-1], which at
t = 0 is the x0 estimate; or, asked for the trajectory, x at every t of the grid.
Only the multistep ones and lcm look at the path. None evaluates the velocity at t = 0.
Where `after` is given, x = after(x, t, number of the step) follows every step to t.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd3_jax.diffusion.paths import RF, Batch, Path

Velocity = Callable[[Array, Array], Array]
Grid = Float[Array | np.ndarray, " n"]
After = Callable[[Array, Array, Array], Array]
Draw = Callable[[Array], Array]
Solution = Batch | Float[Array, "n b ..."]


def euler(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
) -> Solution:
    def step(x, _, t, t_next):
        return x + (t_next - t) * velocity(x, _times(t, x)), None

    grid = jnp.asarray(grid, jnp.float32)
    return _scan(step, x, None, grid, (grid[:-1], grid[1:]), trajectory, after)


def heun(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
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
    return _scan(step, x, None, grid, (grid[:-1], grid[1:]), trajectory, after)


def dpmpp_2m(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
) -> Solution:
    """DPM-Solver++(2M) (Lu et al. 2022) as the released code has it.

    The x0 estimate is extrapolated in lambda = -log b_t (not log a_t / b_t), except in
    the first step and in one to t = 0. Second order where lambda's steps are small.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)
    h = -jnp.diff(jnp.log(jnp.where(b > 0, b, 1)))  # a last one to b = 0 is not used
    slope = jnp.where(b[2:] > 0, h[1:] / (2 * h[:-1]), 0)
    return _multistep(velocity, x, grid, slope, path, trajectory, after)


def dpmpp_2m_flow(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
) -> Solution:
    """DPM-Solver++(2M) with lambda = log a_t / b_t, as diffusers runs it on flows.

    Its first and last steps are of first order, and so is any from t = 1, where lambda
    is infinite. The network is given t itself; diffusers cuts 1000 t to a whole number.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)
    inner = (a > 0) & (b > 0)  # elsewhere lambda is infinite
    lambda_ = jnp.log(jnp.where(inner, a, 1)) - jnp.log(jnp.where(inner, b, 1))
    h = jnp.diff(lambda_)
    second = inner[2:] & inner[1:-1] & inner[:-2]
    slope = jnp.where(second, h[1:] / jnp.where(second, 2 * h[:-1], 1), 0)
    return _multistep(velocity, x, grid, slope, path, trajectory, after)


def lcm(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    draw: Draw,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
) -> Solution:
    """To the x0 estimate and back to the next t with new noise, draw(number of the
    step): what models distilled to consistency are sampled with (Luo et al. 2023).

    A random walk: it solves no equation, and more steps do not bring it nearer to one.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)

    def step(x, _, i, t, a_next, b_next):
        t = _times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return a_next * x0 + b_next * draw(i), None

    steps = jnp.arange(len(grid) - 1), grid[:-1], a[1:], b[1:]
    return _scan(step, x, None, grid, steps, trajectory, after)


SOLVERS = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_flow": dpmpp_2m_flow,
    "lcm": lcm,
}


def draws(solver: Callable) -> bool:
    """Whether a solver takes noise of its own, as `draw`."""
    return "draw" in inspect.signature(solver).parameters


def _multistep(velocity, x, grid, slope, path, trajectory, after):
    """Each step to the x0 estimate, from the second on extrapolated by its `slope`."""
    a, b = path.coefficients(grid)
    keep = b[1:] / b[:-1]
    gain = a[1:] - keep * a[:-1]

    def step(x, x0_last, t, keep, gain, slope):
        t = _times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return keep * x + gain * (x0 + slope * (x0 - x0_last)), x0

    x0_last = jnp.zeros(x.shape, jnp.float32)
    steps = grid[:-1], keep, gain, jnp.pad(slope, (1, 0))
    return _scan(step, x, x0_last, grid, steps, trajectory, after)


def _scan(step, x, memory, grid, steps, trajectory, after):
    """(x, memory) = step(x, memory, *s) for each s of steps, and x = after(...)."""

    def body(carry, s):
        i, t_next, *s = s
        with jax.named_scope("solver"):
            x, memory = step(*carry, *s)
        x = x if after is None else after(x, t_next, i)
        return (x, memory), x if trajectory else None

    x = x.astype(jnp.float32)
    steps = jnp.arange(len(grid) - 1), grid[1:], *steps
    (last, _), xs = jax.lax.scan(body, (x, memory), steps)
    return jnp.concatenate([x[None], xs]) if trajectory else last


def _times(t, x):
    return jnp.full(x.shape[:1], t)  # (b,)
