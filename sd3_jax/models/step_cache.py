"""Step caching: what blocks add to the image tokens, kept from one step to the next.

A skipped step adds a prediction from earlier steps instead of running the blocks.
diffusers has the same methods as hooks: first_block_cache.py (ParaAttention's),
mag_cache.py (Ma et al. 2025) and taylorseer_cache.py (Liu et al. 2025).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int

# The collection of variables, and the variable in it, that hold the State.
COLLECTION, NAME = "step_cache", "state"


# Static because it decides which arrays the loop carries and what each step compiles.
class Method(NamedTuple):
    """How a step is decided and replaced; static, so it is part of a program.

    `first_block` runs the first block in every step and lets its change decide; the
    other methods follow the Schedule alone. `order` is that of the Taylor series.
    """

    name: str
    first_block: bool = False
    order: int = 0
    measures: bool = False  # whether State.measures are ratios of magnitudes


METHODS = {
    "first_block": Method("first_block", first_block=True),
    "magcache": Method("magcache"),
    "taylorseer": Method("taylorseer", order=1),
}
# Computes every step and measures what MagCache reads.
CALIBRATION = Method("calibration", measures=True)


class Schedule(NamedTuple):
    """Which steps are computed: data of a program.

    `must` are steps that are computed in any case. In the others, a first block that
    changes by more than `threshold` has the rest computed.
    """

    # Arrays and not numbers of Python: another threshold or number of steps reuses the
    # program.
    must: Bool[Array, " n"]
    threshold: Float[Array, ""]


class State(NamedTuple):
    """What steps leave to those that follow.

    `terms` are the residual that the blocks add to the image tokens, at the step that
    was computed last, and its differences, (b, n, d) each. `computed` and `measures`
    describe the steps so far.
    """

    step: Int[Array, ""]
    last: Int[Array, ""]  # the step that was computed last
    updates: Int[Array, ""]  # number of computed steps
    terms: tuple[Float[Array, "b n d"], ...]
    first: Float[Array, "b n d"] | None  # what the first block added at `last`
    computed: Bool[Array, " n"]
    measures: Float[Array, " n"]


class Record(NamedTuple):
    """Of a run's steps: whether their blocks were computed, and what was measured.

    `measures` are the first block's relative change for first_block, and the ratio of
    magnitudes for a calibration.
    """

    computed: Bool[Array | np.ndarray, " n"]
    measures: Float[Array | np.ndarray, " n"]

    def of_steps(self, steps: int) -> "Record":
        """The record of the first steps, without the padding of a program."""
        return Record(self.computed[:steps], self.measures[:steps])


def all_computed(steps: int) -> Record:
    """The record of a run without a cache."""
    # In numpy: jax would compile a program for each number of steps.
    return Record(np.ones(steps, bool), np.ones(steps, np.float32))


class Cache(NamedTuple):
    """A method with its schedule, as a denoiser takes them."""

    method: Method
    schedule: Schedule

    def initial(self, tokens: Float[Array, "b n d"]) -> State:
        """The state before the first step, for image tokens of this shape."""
        steps = self.schedule.must.shape
        zero, none = jnp.int32(0), jnp.zeros_like(tokens)
        # Differences of bfloat16 would lose the bits that a Taylor series multiplies.
        term = none.astype(jnp.float32) if self.method.order else none
        return State(
            step=zero,
            last=zero,
            updates=zero,
            terms=(term,) * (self.method.order + 1),
            first=none if self.method.first_block else None,
            computed=jnp.zeros(steps, bool),
            measures=jnp.ones(steps, jnp.float32),
        )


def around(
    module: nn.Module,
    cache: Cache | None,
    streams: Sequence[Float[Array, "b _ d"]],
    c: Float[Array, "b d"],
    blocks: Callable[..., Array],
) -> Float[Array, "b n d"]:
    """The image tokens after all blocks of an MMDiT, computed or predicted.

    streams[0] are the image tokens before them, `c` the condition.
    blocks(module, streams) are the image tokens after them, without the blocks `skip`
    if it is given. The State is the module's variable NAME of COLLECTION.
    """
    if cache is None:
        return blocks(module, streams)
    method, schedule = cache
    state = module.get_variable(COLLECTION, NAME)
    # Before the first computed step `terms` are zeros: nothing can be predicted from
    # them.
    must = schedule.must[state.step] | (state.updates == 0)
    added, measure = None, jnp.float32(1)
    if method.first_block:
        before, streams = streams[0], _first_block(module, streams, c)
        added = streams[0] - before
        # In the first step state.first is zero and the ratio infinite or NaN: `must` is
        # true.
        measure = relative_change(added, state.first)
        must |= measure > schedule.threshold
    x = streams[0]

    def compute(module, streams, state):
        # The first block has run above.
        left_out = (0,) if method.first_block else ()
        y = blocks(module, streams, skip=left_out)
        state = _updated(state, y - x)
        return y, state if added is None else state._replace(first=added)

    # The residual of all blocks (or of those after the first), added to this step's
    # tokens.
    def reuse(module, streams, state):
        return x + predicted(state).astype(x.dtype), state

    # A branch that does not run costs nothing. Its predicate is one number for the
    # whole batch, from sums over all devices, so that they take the same branch.
    y, changed = nn.cond(must, compute, reuse, module, streams, state)
    # CALIBRATION computes each step, so that these are residuals of neighbouring steps.
    if method.measures:
        measure = magnitude_ratio(changed.terms[0], state.terms[0])
    # Of the first step there is nothing to compare with.
    measure = jnp.where(state.updates > 0, measure, 1.0)
    changed = changed._replace(
        step=state.step + 1,
        computed=state.computed.at[state.step].set(must),
        measures=state.measures.at[state.step].set(measure),
    )
    # Outside of nn.cond, whose branches return the state instead of writing it.
    module.put_variable(COLLECTION, NAME, changed)
    return y


def _first_block(module: Any, streams: Sequence[Array], c: Array) -> Sequence[Array]:
    """The streams after the first of several blocks, which is a layer of a scan."""
    # Outside of the scan, with its layer of the stacked weights. flax allows no second
    # submodule of the same name: this one has no parent.
    # SD3.5-medium's dual-attention blocks are the first ones (MMDiT-X).
    name = "dual_blocks" if module.dual_blocks else "blocks"
    params = jax.tree.map(lambda x: x[0], module.variables["params"][name])
    block = module.joint_block(name, dual=name == "dual_blocks", parent=None)
    run = lambda block: block(streams, block.modulations(c))
    return nn.apply(run, block)({"params": params})


def relative_change(x: Float[Array, "b n d"], before: Float[Array, "b n d"]) -> Array:
    """mean |x - before| / mean |before|, over all rows at once (First-Block Cache)."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    return jnp.abs(x - before).mean() / jnp.abs(before).mean()


def magnitude_ratio(x: Float[Array, "b n d"], before: Float[Array, "b n d"]) -> Array:
    """The mean over tokens of |x| / |before| (MagCache, eq 4)."""
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1)
    return (norm(x) / (norm(before) + 1e-8)).mean()


def predicted(state: State) -> Float[Array, "b n d"]:
    """The residual at state.step: a Taylor series about the last computed step."""
    offset = (state.step - state.last).astype(jnp.float32)
    return sum(
        # The residual itself stays in its dtype.
        term if order == 0 else term * (offset**order / math.factorial(order))
        for order, term in enumerate(state.terms)
    )


def _updated(state: State, residual: Array) -> State:
    """The state with the residual of state.step, and its backward differences."""
    gap = (state.step - state.last).astype(jnp.float32)
    terms = [residual.astype(state.terms[0].dtype)]
    for order, before in enumerate(state.terms[:-1]):
        # Divided by the steps between, since skipped steps make them unequal.
        difference = (terms[order] - before) / jnp.maximum(gap, 1)
        # A difference of order k needs k computed steps before this one.
        terms.append(jnp.where(state.updates > order, difference, 0))
    return state._replace(
        last=state.step, updates=state.updates + 1, terms=tuple(terms)
    )
