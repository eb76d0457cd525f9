"""Multistep solvers: one evaluation a step, and polynomials through earlier ones.

All their steps have one form (multistep_weights.Weights), so that the weights alone
tell solvers apart, and one program serves all of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sd3_jax.diffusion.multistep_weights import MULTISTEP, OF_NOISE, Weights
from sd3_jax.diffusion.paths import RF, Batch, Path
from sd3_jax.diffusion.solver_loop import (
    After,
    Draw,
    Grid,
    Integer,
    Solution,
    Velocity,
    by_row,
    loop,
    times,
)


def multistep(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    solver: str | Integer,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """A solver of MULTISTEP, by its name or by its number there, which may be traced.

    dpmpp_3m_flow, unipc_2, unipc_3, deis_2, deis_3 and res_2m. All are of first order
    in a step to t = 0, and in one from t = 1 but for UniPC's corrector.
    """
    grid = jnp.asarray(grid, jnp.float32)
    # Before the loop: the weights of all steps follow from the grid, so a step only
    # reads its row.
    weights = choose_weights(MULTISTEP, solver, grid, path, steps)
    names = [*MULTISTEP]
    if isinstance(solver, str):
        of_noise = jnp.asarray(solver in OF_NOISE)
    else:
        of_noise = jnp.asarray([name in OF_NOISE for name in names])[solver]
    return run(
        velocity,
        x,
        grid,
        weights,
        of_noise=of_noise,
        path=path,
        trajectory=trajectory,
        after=after,
        steps=steps,
    )


def choose_weights(
    table: dict[str, Callable],
    solver: str | Integer,
    grid: Float[Array, "*b n"],
    path: Path,
    steps: Integer | None,
) -> Weights:
    """The weights of the solver with this name, or this number, which may be traced.

    With grids (b, n) of rows, their solvers and steps are (b,), and weights (b, n - 1).
    """
    if isinstance(solver, str):
        return table[solver](grid, path, steps)

    def weights(grid, solver, steps):
        # A switch over a few small arrays. A switch over the solvers themselves would
        # have the network in the program once for each.
        branches = [lambda f=f: f(grid, path, steps) for f in table.values()]
        return jax.lax.switch(jnp.asarray(solver), branches)

    return by_row(weights, grid, solver, steps)


def run(
    velocity: Velocity,
    x: Batch,
    grid: Float[Array, "*b n"],
    weights: Weights,
    *,
    of_noise: Bool[Array, ""] | bool = False,
    draw: Draw | None = None,
    path: Path,
    trajectory: bool,
    after: After | None,
    steps: Integer | None,
) -> Solution:
    """The loop of steps with these weights; m is the noise if `of_noise`, else x0."""

    def step(x, history, t, i, w):
        t = times(t, x)
        v = velocity(x, t)
        x0 = path.x0(x, v, t)
        # Both are computed and one is selected: beside the velocity they cost nothing,
        # and a branch would keep XLA from fusing them.
        m = jnp.where(of_noise, path.noise(x, v, t), x0)
        m1, m2, m3 = history
        # UniPC's corrector: m, a prediction at the end of the step before, corrects
        # that step. For all others these weights are 0.
        new, *old = w.correct
        y = x + new * (m - m1) + old[0] * (m2 - m1) + old[1] * (m3 - m1)
        # Also where m is the noise: with a constant prediction both forms are this one.
        x = w.keep * y + w.gain * x0
        x = x + w.extend[0] * (m1 - m) + w.extend[1] * (m2 - m)
        if draw is not None:
            # draw depends on the step's number alone: stopping early, or a trajectory,
            # leaves the noise of earlier steps as it was.
            x = x + w.scatter * draw(jnp.ravel(i)[0])  # rows are at one step
        return x, (m, m1, m2)

    # Until there are predictions, their weights are 0.
    history = (jnp.zeros(x.shape, jnp.float32),) * 3
    leaves, treedef = jax.tree.flatten(weights)
    unpacked = lambda x, history, t, i, *w: step(x, history, t, i, treedef.unflatten(w))
    index = jnp.broadcast_to(jnp.arange(grid.shape[-1] - 1), grid[..., 1:].shape)
    columns = grid[..., :-1], index, *leaves
    return loop(velocity, unpacked, x, history, grid, columns, trajectory, after, steps)
