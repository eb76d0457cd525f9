"""Solvers of dx = v(x, t) dt from grid[0] to grid[-1], and the table of all of them.

All take velocity(x, t), x (b, ...) and a falling grid (n,). They keep x in float32 and
return it at grid[-1], which at t = 0 is the x0 estimate. With `trajectory`, they return
x at every t of the grid, (n, b, ...). `after(x, t, step)`, if given, replaces x after
every step; t is the time reached. The velocity is never evaluated at t = 0. `path` says
how x0 and noise follow from a velocity; euler, heun and adaptive do not need it.

With `steps`, a solver stops at grid[steps], and the rest of the grid is padding. Traced
`steps` let one program serve any number of steps, but without gradients. A `trajectory`
takes all steps of the grid.
"""

import functools
import inspect
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sd3_jax.diffusion.adaptive_solver import adaptive
from sd3_jax.diffusion.multistep_solvers import multistep
from sd3_jax.diffusion.multistep_weights import MULTISTEP
from sd3_jax.diffusion.paths import RF, Batch, Path, expand
from sd3_jax.diffusion.solver_loop import (
    After,
    Grid,
    Integer,
    Solution,
    Velocity,
    by_row,
    loop,
    times,
)
from sd3_jax.diffusion.stochastic_solvers import STOCHASTIC, lcm, stochastic


def euler(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """First order: x + dt v."""

    def step(x, _, t, t_next):
        return _euler_update(x, velocity(x, times(t, x)), t, t_next), None

    grid = jnp.asarray(grid, jnp.float32)
    return loop(
        velocity, step, x, None, grid, (grid[:-1], grid[1:]), trajectory, after, steps
    )


def heun(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """Second order, by the mean of the slopes at both ends (Karras et al. 2022, alg 1).

    A step to t = 0 is Euler's: no network is trained there.
    """

    def step(x, _, t, t_next):
        dt = t_next - t
        v = velocity(x, times(t, x)).astype(jnp.float32)
        # cond, not where: only one of two branches runs, the last step is one call.
        v_next = jax.lax.cond(
            t_next > 0,
            lambda: velocity(x + dt * v, times(t_next, x)).astype(jnp.float32),
            lambda: v,
        )
        return x + dt * (v + v_next) / 2, None

    grid = jnp.asarray(grid, jnp.float32)
    return loop(
        velocity, step, x, None, grid, (grid[:-1], grid[1:]), trajectory, after, steps
    )


def dpmpp_2m(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """DPM-Solver++(2M) (Lu et al. 2022), as in Stability's released code.

    Second order where steps in lambda are small; first order in the first step and in
    one to t = 0.
    """
    grid = jnp.asarray(grid, jnp.float32)
    slope = _log_b_slope(grid, path)
    return _multistep(velocity, x, grid, slope, path, trajectory, after, steps)


def dpmpp_2m_flow(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """DPM-Solver++(2M) with lambda = log a_t / b_t, as diffusers runs it on flows.

    The first and last steps are of first order, and so is a step from t = 1, where
    lambda is infinite. Unlike diffusers, which truncates 1000 t to an integer, this
    gives the network t itself.
    """
    grid = jnp.asarray(grid, jnp.float32)
    slope = _log_ratio_slope(grid, path)
    return _multistep(velocity, x, grid, slope, path, trajectory, after, steps)


def one_evaluation(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    solver: Integer,
    path: Path = RF,
    after: After | None = None,
    steps: Integer | None = None,
) -> Batch:
    """The solver ONE_EVALUATION[solver], a number that may be traced.

    One program serves them all, since they differ only in how x is updated. Rows with
    grids (b, n) of their own may have solvers and steps (b,) of their own.
    """
    grid, solver = jnp.asarray(grid, jnp.float32), jnp.asarray(solver)
    is_euler = solver == ONE_EVALUATION.index("euler")
    is_euler = expand(is_euler, x) if grid.ndim == 2 else is_euler

    def weights_of(grid, solver):
        is_2m = solver == ONE_EVALUATION.index("dpmpp_2m")
        slope = jnp.where(is_2m, _log_b_slope(grid, path), _log_ratio_slope(grid, path))
        return _multistep_weights(grid, slope, path)

    def step(x, x0_last, t, t_next, *weights):
        t_rows = times(t, x)
        v = velocity(x, t_rows)
        x0 = path.x0(x, v, t_rows)
        # Both updates are computed and one is selected. Beside the velocity they cost
        # nothing, and a branch would keep XLA from fusing them.
        first_order = _euler_update(x, v, t, t_next)
        multistep = _multistep_update(x, x0, x0_last, *weights)
        return jnp.where(is_euler, first_order, multistep), x0

    x0_last = jnp.zeros(x.shape, jnp.float32)
    columns = grid[..., :-1], grid[..., 1:], *by_row(weights_of, grid, solver)
    return loop(velocity, step, x, x0_last, grid, columns, False, after, steps)


ONE_EVALUATION = ("euler", "dpmpp_2m", "dpmpp_2m_flow")
SOLVERS = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_flow": dpmpp_2m_flow,
    **{name: functools.partial(multistep, solver=name) for name in MULTISTEP},
    **{name: functools.partial(stochastic, solver=name) for name in STOCHASTIC},
    "lcm": lcm,
    "adaptive": adaptive,
}
# Velocities that a step takes, where it is not one.
PASSES = {"heun": 2, "adaptive": 3}
# Each of these runs any of its names, by a number that may be traced.
SHARED = {
    ONE_EVALUATION: one_evaluation,
    tuple(MULTISTEP): multistep,
    tuple(STOCHASTIC): stochastic,
}


def draws(solver: Callable) -> bool:
    """Whether a solver draws noise, through an argument `draw`."""
    return "draw" in inspect.signature(solver).parameters


def passes(name: str, steps: int) -> int:
    """Velocities that so many steps down to t = 0 take; of adaptive, at most."""
    # heun's last step is Euler's. The pair of adaptive takes one more at the start.
    return PASSES.get(name, 1) * steps + {"heun": -1, "adaptive": 1}.get(name, 0)


def same_program(name: str) -> tuple[str, ...]:
    """The solvers that share a compiled program with this one, itself included."""
    return next((names for names in SHARED if name in names), (name,))


def of_program(names: Sequence[str], number: Integer | None) -> Callable:
    """The solver names[number] of a same_program; the number may be traced."""
    if len(names) == 1:
        return SOLVERS[names[0]]
    return functools.partial(SHARED[tuple(names)], solver=number)


def _euler_update(x, v, t, t_next):
    # dt is negative: t falls from noise to data.
    return x + (t_next - t) * v


def _log_b_slope(grid, path):
    """Half the ratio of a step in lambda to the one before it; 0 is first order."""
    # The released code extrapolates x0 in lambda = -log b_t, not in log a_t / b_t.
    _, b = path.coefficients(grid)
    h = -jnp.diff(jnp.log(jnp.where(b > 0, b, 1)))  # a last one to b = 0 is not used
    return jnp.where(b[2:] > 0, h[1:] / (2 * h[:-1]), 0)  # (n - 2,)


def _log_ratio_slope(grid, path):
    """The same in lambda = log a_t / b_t."""
    a, b = path.coefficients(grid)
    inner = (a > 0) & (b > 0)  # elsewhere lambda is infinite
    lambda_ = jnp.log(jnp.where(inner, a, 1)) - jnp.log(jnp.where(inner, b, 1))
    h = jnp.diff(lambda_)
    second = inner[2:] & inner[1:-1] & inner[:-2]  # three times with finite lambda
    return jnp.where(second, h[1:] / jnp.where(second, 2 * h[:-1], 1), 0)  # (n - 2,)


def _multistep(velocity, x, grid, slope, path, trajectory, after, steps):
    """Exponential integrator in x0, extrapolated by `slope` from the second step on."""

    def step(x, x0_last, t, *weights):
        t = times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return _multistep_update(x, x0, x0_last, *weights), x0

    x0_last = jnp.zeros(x.shape, jnp.float32)  # the first step's slope is 0
    columns = grid[:-1], *_multistep_weights(grid, slope, path)
    return loop(velocity, step, x, x0_last, grid, columns, trajectory, after, steps)


def _multistep_weights(grid, slope, path):
    """keep, gain and slope of each step, (n - 1,)."""
    a, b = path.coefficients(grid)
    keep = b[1:] / b[:-1]  # what is left of x
    return keep, a[1:] - keep * a[:-1], jnp.pad(slope, (1, 0))


def _multistep_update(x, x0, x0_last, keep, gain, slope):
    """x' = (b'/b) x + (a' - (b'/b) a) x0, exact for a constant x0 estimate."""
    return keep * x + gain * (x0 + slope * (x0 - x0_last))
