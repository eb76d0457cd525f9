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
NODES = np.array([0, 1 / 2, 3 / 4, 1], np.float32)
STAGES = np.array(
    [[0, 0, 0], [1 / 2, 0, 0], [0, 3 / 4, 0], [2 / 9, 1 / 3, 4 / 9]], np.float32
)
ERROR = np.array([-5 / 72, 1 / 12, 1 / 9, -1 / 8], np.float32)  # third less second
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
    most = jnp.asarray(len(grid) - 1 if steps is None else steps)
    x, rows = x.astype(jnp.float32), x.shape[:1]
    # A time for each example: one batch takes steps of unlike lengths, so that a
    # picture is the same in any batch.
    start, end = (jnp.full(rows, t) for t in (grid[0], grid[most]))
    stop = jnp.where(end > 0, end, jnp.minimum(LAST, start))
    # With `after`, x is not where the last slope was taken: it is evaluated again.
    reused = after is None

    def turn(state: _State) -> _State:
        with jax.named_scope("solver"):  # named in profiles
            share = (state.t - stop) / (most - state.turn)
            state = _attempt(velocity, state, stop, share, tolerance, reused)
        if after is not None:
            state = state._replace(x=after(state.x, state.t, state.turn - 1))
        return state

    # Only the first step needs it: the pair's last stage is the next step's first
    # (FSAL).
    slope = velocity(x, start).astype(jnp.float32)
    # A first guess. One that is too long costs a repeated step, one too short a few
    # more steps, since dt grows by 5 at most.
    dt = jnp.full(rows, grid[0] - grid[1])
    ones = jnp.ones(rows, jnp.int32)
    state = _State(x, slope, start, dt, turn=jnp.int32(0), evaluations=ones)
    # The bound on turns leaves nothing undone: in the last turn `share` is all that
    # remains, and a step as short as that is accepted whatever its error.
    unfinished = lambda state: (state.t > stop).any() & (state.turn < most)
    state = jax.lax.while_loop(unfinished, turn, state)
    x = state.x - expand(state.t - end, x) * state.slope  # nothing, unless end is 0
    if after is not None:
        x = after(x, end, jnp.maximum(state.turn - 1, 0))
    return x, state.evaluations


def _attempt(
    velocity: Velocity,
    state: _State,
    stop: Float[Array, " b"],
    share: Float[Array, " b"],
    tolerance: Float[Array, ""] | float,
    reused: bool,
) -> _State:
    """A step of each example, kept if its error is small or it is as short as `share`.

    `reused` says that state.slope is the velocity at state.x.
    """
    x, left = state.x, state.t - stop
    # Examples that have arrived have share = left = 0: their steps have no length.
    dt = jnp.clip(state.dt, share, left)

    def point(slopes, i):
        step = jnp.tensordot(jnp.asarray(STAGES)[i], slopes[:3], 1)
        return x - expand(dt, x) * step, state.t - jnp.asarray(NODES)[i] * dt

    def stage(i, slopes):
        return slopes.at[i].set(velocity(*point(slopes, i)).astype(jnp.float32))

    # One loop over the stages, so that the program has the network in it once.
    slopes = jnp.zeros((4, *x.shape), jnp.float32).at[0].set(state.slope)
    slopes = jax.lax.fori_loop(1 if reused else 0, 4, stage, slopes)
    x_next, _ = point(slopes, 3)
    # Hairer, Nørsett & Wanner 1993, eq II.4.10 and 11, with equal absolute and relative
    # tolerances.
    scale = tolerance * (1 + jnp.maximum(jnp.abs(x), jnp.abs(x_next)))
    estimate = expand(dt, x) * jnp.tensordot(ERROR, slopes, 1)
    error = _root_mean_square(estimate / scale)
    moving = left > 0
    accepted = moving & ((error <= 1) | (dt <= share))
    # A step's error is of third order in its length; 0.9 leaves a margin.
    # The bounds hold where an estimate is 0 by chance, or where the slope jumps, as at
    # the edge of a guidance interval.
    factor = jnp.clip(0.9 * jnp.maximum(error, 1e-6) ** (-1 / 3), 0.2, 5)
    # Exactly `stop` at the end: a difference of float32 could stay above it.
    t_next = jnp.where(dt >= left, stop, state.t - dt)
    return _State(
        x=jnp.where(expand(accepted, x), x_next, x),
        # The last stage lies at x_next and its t, so it is the slope there.
        slope=jnp.where(expand(accepted, x), slopes[3], state.slope),
        t=jnp.where(accepted, t_next, state.t),
        dt=jnp.where(moving, dt * factor, dt),
        turn=state.turn + 1,
        # Examples that have arrived are evaluated with the others, and count none.
        evaluations=state.evaluations + (3 if reused else 4) * moving,
    )


def _root_mean_square(x: Batch) -> Float[Array, " b"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=tuple(range(1, x.ndim))))
