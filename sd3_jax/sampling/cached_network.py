"""A denoiser with a step cache, as solvers and guidance take networks with a state."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PyTree

from sd3_jax.diffusion.carried import Remembering
from sd3_jax.models.layers import cut
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.step_cache import COLLECTION, NAME, Cache, State


def remembering(denoiser: MMDiT, variables: dict, cache: Cache) -> Remembering:
    """The denoiser's velocity (x, t, cond, state) -> (v, state)."""

    def velocity(x: Array, t: Array, cond: Any, state: State) -> tuple[Array, State]:
        return apply(denoiser, variables, cache, state, x, t, *cond)

    return Remembering(velocity, lambda x: initial(denoiser, cache, x))


def apply(
    denoiser: MMDiT, variables: dict, cache: Cache, state: State, *args: Array
) -> tuple[Float[Array, "b h w c"], State]:
    """denoiser.apply(variables, *args) with the cache: the velocity and the state."""
    # flax's way to pass a state into `apply` and get it back: a mutable collection.
    variables = {**variables, COLLECTION: {NAME: state}}
    options = dict(cache=cache, mutable=[COLLECTION])
    v, changed = denoiser.apply(variables, *args, **options)
    return v, changed[COLLECTION][NAME]


def initial(denoiser: MMDiT, cache: Cache, x: Float[Array, "b h w c"]) -> State:
    """The state before the first step from rows like those of x."""
    rows, h, w, _ = x.shape
    tokens = (rows, h * w // denoiser.patch**2, denoiser.width)
    # Over the mesh as the blocks' tokens are, so that no device holds all of them.
    return cache.initial(cut(jnp.zeros(tokens, denoiser.dtype)))


def with_state(wrapped: Callable, network: Callable) -> Callable:
    """(x, t, cond, state) -> (v, state) of wrapped(answer)(x, t), which calls
    answer(x, t) once. network(x, t, cond, state) -> (answer, state)."""

    def velocity(x: Array, t: Array, cond: Any, state: PyTree) -> tuple[Array, PyTree]:
        # The inner function runs once while `wrapped` is traced, and leaves its state
        # here: guidance functions return velocities alone.
        states = []

        def answer(x: Array, t: Array) -> Array:
            v, changed = network(x, t, cond, state)
            states.append(changed)
            return v

        return wrapped(answer)(x, t), *states

    return velocity
