"""A solver that chooses its own steps by an estimate of their error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd3_jax.diffusion.paths import RF, Batch, Path, expand
from sd3_jax.diffusion.solver_loop import After, Grid, Integer, Velocity
from sd3_jax.errors import UserError

# Bogacki & Shampine 1989: k[0] to k[2] are the stages of the third order's x', and k[3]
# is the slope there, which is the next step's k[0].
NODES = np.float32([0, 1 / 2, 3 / 4, 1])
STAGES = np.float32([[0, 0, 0], [1 / 2, 0, 0], [0, 3 / 4, 0], [2 / 9, 1 / 3, 4 / 9]])
ERROR = np.float32([-5 / 72, 1 / 12, 1 / 9, -1 / 8])  # third order less second
LAST = 1e-3  # no network is trained below: from there one Euler step leads to t = 0


class _State(NamedTuple):
    x: Batch
    slope: Batch  # the velocity at x and t
    t: Float[Array, " b"]
    dt: Float[Array, " b"]  # how far t falls next
    turn: Int[Array, ""]
    evaluations: Int[Array, " b"]


def adaptive(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Batch:
    """Bogacki & Shampine's 3(2) pair with steps of its own (adaptive_evaluations).

    The grid gives the first and last t, the length of the first step, and by its number
    of steps the bound on steps. It raises UserError for a `trajectory`, which would
    be at the grid's t.
    """
    if trajectory:
        raise UserError(
            "solver adaptive has no trajectory on a grid, because it chooses its own"
            " times; choose another solver"
        )
    return adaptive_evaluations(velocity, x, grid, after=after, steps=steps)[0]


def adaptive_evaluations(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    after: After | None = None,
    steps: Integer | None = None,
    tolerance: Float[Array, ""] | float = 0.01,
) -> tuple[Batch, Int[Array, " b"]]:
    """x at grid[steps], and how many times each example's velocity was used.

    Every example has its own t, so that it does not depend on its batch. A step costs
    three evaluations and is repeated with a shorter one if the root mean square of
    its error exceeds `tolerance` (1 + |x|). There are at most `steps` steps, repeated
    ones counted: no step is shorter than an equal share of what remains.
    """
    grid = jnp.asarray(grid, jnp.float32)
    most = len(grid) - 1 if steps is None else steps
    x, rows = x.astype(jnp.float32), x.shape[:1]
    start, end = (jnp.full(rows, t) for t in (grid[0], grid[most]))
    stop = jnp.where(end > 0, end, jnp.minimum(LAST, start))
    # With `after`, x is not where the last slope was taken: it is evaluated again.
    first_stage = 0 if after is not None else 1

    def turn(state: _State) -> _State:
        left = state.t - stop
        share = left / (most - state.turn)
        dt = jnp.clip(state.dt, share, left)

        def stage(i, slopes):
            return slopes.at[i].set(evaluate(*point(state, dt, slopes, i)))

        slopes = jnp.zeros((4, *x.shape), jnp.float32).at[0].set(state.slope)
        slopes = jax.lax.fori_loop(first_stage, 4, stage, slopes)
        x_next, _ = point(state, dt, slopes, 3)
        estimate = expand(dt, x) * jnp.tensordot(ERROR, slopes, 1)
        scale = tolerance * (1 + jnp.maximum(jnp.abs(state.x), jnp.abs(x_next)))
        error = _root_mean_square(estimate / scale)
        moving = left > 0
        accepted = moving & ((error <= 1) | (dt <= share))
        # The error of a step is of third order in it; 0.9 leaves a margin.
        factor = jnp.clip(0.9 * jnp.maximum(error, 1e-6) ** (-1 / 3), 0.2, 5)
        # Exactly `stop` at the end: a difference of float32 could stay above it.
        t = jnp.where(accepted, jnp.where(dt >= left, stop, state.t - dt), state.t)
        taken = expand(accepted, x)
        x_new = jnp.where(taken, x_next, state.x)
        if after is not None:
            x_new = after(x_new, t, state.turn)
        return _State(
            x_new,
            jnp.where(taken, slopes[3], state.slope),
            t,
            jnp.where(moving, dt * factor, dt),
            state.turn + 1,
            state.evaluations + (4 - first_stage) * moving,
        )

    def point(state, dt, slopes, i):
        """Where a stage is evaluated."""
        step = jnp.tensordot(jnp.asarray(STAGES)[i], slopes[:3], 1)
        return state.x - expand(dt, x) * step, state.t - jnp.asarray(NODES)[i] * dt

    def evaluate(x, t):
        return velocity(x, t).astype(jnp.float32)

    state = _State(
        *(x, evaluate(x, start), start, jnp.full(rows, grid[0] - grid[1])),
        turn=jnp.int32(0),
        evaluations=jnp.ones(rows, jnp.int32),
    )
    unfinished = lambda state: (state.t > stop).any() & (state.turn < most)
    with jax.named_scope("solver"):
        state = jax.lax.while_loop(unfinished, turn, state)
    x = state.x - expand(state.t - end, x) * state.slope  # nothing, unless end is 0
    if after is not None:
        x = after(x, end, jnp.maximum(state.turn - 1, 0))
    return x, state.evaluations


def _root_mean_square(x: Batch) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim))))
