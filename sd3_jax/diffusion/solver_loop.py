"""The loop over a grid that all solvers with fixed steps share, and their types."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd3_jax.diffusion.carried import Carried, initial
from sd3_jax.diffusion.paths import Batch, expand

Velocity = Callable[[Array, Array], Array]  # (x, t (b,)) -> v
# (n,), or (b, n) where each row of a batch has a grid of its own.
Grid = Float[Array | np.ndarray, "*b n"]
After = Callable[[Array, Array, Array], Array]  # (x, t, step) -> x
Integer = Int[Array | np.generic | np.ndarray, "*b"] | int
Draw = Callable[[Array], Array]  # step -> noise (b, ...)
Solution = Batch | Float[Array, "n b ..."]  # x at the end, or the trajectory


def loop(
    velocity: Velocity,
    step: Callable[..., tuple[Array, Any]],
    x: Batch,
    memory: Any,
    grid: Float[Array, "*b n"],
    columns: Sequence[Array],
    trajectory: bool,
    after: After | None,
    steps: Integer | None,
) -> Solution:
    """(x, memory) = step(x, memory, *s) for each row s of `columns`; x = after(...).

    `memory` is what a multistep solver carries, None for the others. The loop carries
    the state of a Carried `velocity` as well. With a grid (b, n), `columns` are (b,
    n - 1) and `steps` (b,); step gets numbers (b, 1, ...).
    """
    if trajectory and steps is not None:
        raise ValueError("give trajectory or steps: a trajectory has all steps")

    def body(carry, s):
        x, memory, state = carry
        i, t_next, *s = s
        if isinstance(velocity, Carried):
            # The state passes through the loop's carry; the velocity has it within the
            # step.
            velocity.enter(state)
        with jax.named_scope("solver"):  # named in profiles
            x, memory = step(x, memory, *s)
        if isinstance(velocity, Carried):
            state = velocity.leave()
        x = x if after is None else after(x, t_next, i)
        return (x, memory, state), x if trajectory else None

    # float32: many small steps in bfloat16 would each round x to 8 bits.
    x = x.astype(jnp.float32)
    carry = x, memory, initial(velocity, x)
    if grid.ndim == 2:
        return _loop_by_row(body, carry, (grid[:, 1:], *columns), steps)
    columns = jnp.arange(len(grid) - 1), grid[1:], *columns
    if steps is not None:
        # A while loop, whose trip count is data: it never reaches the padding.
        turn = lambda i, carry: body(carry, [column[i] for column in columns])[0]
        (last, _, state), xs = jax.lax.fori_loop(0, steps, turn, carry), None
    else:
        # A scan, since it keeps every x and has gradients, which a loop of traced
        # length has not.
        (last, _, state), xs = jax.lax.scan(body, carry, columns)  # xs (n - 1, b, ...)
    if isinstance(velocity, Carried):
        velocity.final = state
    return jnp.concatenate([x[None], xs]) if xs is not None else last


def _loop_by_row(
    body: Callable, carry: Any, columns: Sequence[Array], steps: Integer | None
) -> Batch:
    """The loop in which each row takes its own number of steps, (b,)."""
    x = carry[0]

    def turn(i, carry):
        numbers = [expand(column[:, i], x) for column in columns]
        new, _ = body(carry, [i, *numbers])
        # A row that has arrived stays: what the padding of its grid gives is dropped.
        going = i < jnp.asarray(steps)
        keep = lambda after, before: jnp.where(expand(going, after), after, before)
        return jax.tree.map(keep, new, carry)

    return jax.lax.fori_loop(0, jnp.max(jnp.asarray(steps)), turn, carry)[0]


def by_row(function: Callable, grid: Array, *numbers: Any) -> Any:
    """function(grid, *numbers), for each row if each has a grid of its own."""
    return (jax.vmap(function) if grid.ndim == 2 else function)(grid, *numbers)


def times(t: Float[Array, "..."], x: Batch) -> Float[Array, " b"]:
    """A scalar t for every row, as models take it; or the rows' own, (b, 1, ...)."""
    return jnp.full(x.shape[:1], t if t.ndim == 0 else t.reshape(-1))
