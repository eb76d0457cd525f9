"""Solvers of dx = v(x, t) dt from grid[0] to grid[-1], each one scan over the grid.

All take velocity(x, t), x (b, ...) and a falling grid (n,). They keep x in float32 and
return it at grid[-1], which at t = 0 is the x0 estimate. With `trajectory`, they return
x at every t of the grid, (n, b, ...). `after(x, t, step)`, if given, replaces x after
every step; t is the time reached. Only the multistep solvers and lcm use `path`. The
velocity is never evaluated at t = 0.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd3_jax.diffusion.paths import RF, Batch, Path

Velocity = Callable[[Array, Array], Array]  # (x, t (b,)) -> v
Grid = Float[Array | np.ndarray, " n"]
After = Callable[[Array, Array, Array], Array]  # (x, t, step) -> x
Draw = Callable[[Array], Array]  # step -> noise (b, ...)
Solution = Batch | Float[Array, "n b ..."]  # x at the end, or the trajectory


def euler(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
) -> Solution:
    """First order: x + dt v."""

    def step(x, _, t, t_next):
        # dt is negative: t falls from noise to data.
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
    """Second order, by the mean of the slopes at both ends (Karras et al. 2022, alg 1).

    A step to t = 0 is Euler's: no network is trained there.
    """

    def step(x, _, t, t_next):
        dt = t_next - t
        v = velocity(x, _times(t, x)).astype(jnp.float32)
        # cond, not where: only one of two branches runs, the last step is one call.
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
    """DPM-Solver++(2M) (Lu et al. 2022), as in Stability's released code.

    Second order where steps in lambda are small; first order in the first step and in
    one to t = 0.
    """
    # The released code extrapolates x0 in lambda = -log b_t, not in log a_t / b_t.
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)
    h = -jnp.diff(jnp.log(jnp.where(b > 0, b, 1)))  # a last one to b = 0 is not used
    # Half the ratio of this step in lambda to the one before it; 0 is first order.
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

    The first and last steps are of first order, and so is a step from t = 1, where
    lambda is infinite. Unlike diffusers, which truncates 1000 t to an integer, this
    gives the network t itself.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)
    inner = (a > 0) & (b > 0)  # elsewhere lambda is infinite
    lambda_ = jnp.log(jnp.where(inner, a, 1)) - jnp.log(jnp.where(inner, b, 1))
    h = jnp.diff(lambda_)
    second = inner[2:] & inner[1:-1] & inner[:-2]  # three times with finite lambda
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
    """Consistency sampling (Luo et al. 2023), for models that are distilled for it.

    Each step goes to the x0 estimate, and back to the next t with the new noise
    draw(step). It is a random walk: more steps do not approach the solution of an ODE.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)

    def step(x, _, i, t, a_next, b_next):
        t = _times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return a_next * x0 + b_next * draw(i), None  # b is 0 at t = 0: no noise

    steps = jnp.arange(len(grid) - 1), grid[:-1], a[1:], b[1:]  # each (n - 1,)
    return _scan(step, x, None, grid, steps, trajectory, after)


SOLVERS = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_flow": dpmpp_2m_flow,
    "lcm": lcm,
}


def draws(solver: Callable) -> bool:
    """Whether a solver draws noise, through an argument `draw`."""
    return "draw" in inspect.signature(solver).parameters


def _multistep(velocity, x, grid, slope, path, trajectory, after):
    """Exponential integrator in x0, extrapolated by `slope` from the second step on.

    x' = (b'/b) x + (a' - (b'/b) a) x0, which is exact for a constant x0 estimate.
    """
    a, b = path.coefficients(grid)
    keep = b[1:] / b[:-1]  # (n - 1,); what is left of x
    gain = a[1:] - keep * a[:-1]

    def step(x, x0_last, t, keep, gain, slope):
        t = _times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return keep * x + gain * (x0 + slope * (x0 - x0_last)), x0

    x0_last = jnp.zeros(x.shape, jnp.float32)  # the first step's slope is 0
    steps = grid[:-1], keep, gain, jnp.pad(slope, (1, 0))  # each (n - 1,)
    return _scan(step, x, x0_last, grid, steps, trajectory, after)


def _scan(step, x, memory, grid, steps, trajectory, after):
    """Scan (x, memory) = step(x, memory, *s) over s of `steps`; then x = after(...).

    `memory` is what a multistep solver carries, None for the others.
    """

    def body(carry, s):
        i, t_next, *s = s
        with jax.named_scope("solver"):  # named in profiles
            x, memory = step(*carry, *s)
        x = x if after is None else after(x, t_next, i)
        return (x, memory), x if trajectory else None

    # float32: many small steps in bfloat16 would each round x to 8 bits.
    x = x.astype(jnp.float32)
    steps = jnp.arange(len(grid) - 1), grid[1:], *steps
    (last, _), xs = jax.lax.scan(body, (x, memory), steps)  # xs (n - 1, b, ...)
    return jnp.concatenate([x[None], xs]) if xs is not None else last


def _times(t, x):
    """A scalar t for every row, as models take it."""
    return jnp.full(x.shape[:1], t)  # (b,)
