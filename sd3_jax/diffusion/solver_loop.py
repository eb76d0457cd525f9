"""The loop over a grid that all solvers with fixed steps share, and their types."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sd3_jax.diffusion.carried import Carried, initial
from sd3_jax.diffusion.paths import Batch

Velocity = Callable[[Array, Array], Array]  # (x, t (b,)) -> v
Grid = Float[Array | np.ndarray, " n"]
After = Callable[[Array, Array, Array], Array]  # (x, t, step) -> x
Integer = Int[Array | np.generic, ""] | int
Draw = Callable[[Array], Array]  # step -> noise (b, ...)
Solution = Batch | Float[Array, "n b ..."]  # x at the end, or the trajectory


def loop(
    velocity: Velocity,
    step: Callable[..., tuple[Array, Any]],
    x: Batch,
    memory: Any,
    grid: Float[Array, " n"],
    columns: Sequence[Array],
    trajectory: bool,
    after: After | None,
    steps: Integer | None,
) -> Solution:
    """(x, memory) = step(x, memory, *s) for each row s of `columns`; x = after(...).

    `memory` is what a multistep solver carries, None for the others. The loop carries
    the state of a Carried `velocity` as well.
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
    columns = jnp.arange(len(grid) - 1), grid[1:], *columns
    carry = x, memory, initial(velocity, x)
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


def times(t: Float[Array, ""], x: Batch) -> Float[Array, " b"]:
    """A scalar t for every row, as models take it."""
    return jnp.full(x.shape[:1], t)
