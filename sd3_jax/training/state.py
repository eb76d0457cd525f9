"""TrainState: the arrays that a step updates and a checkpoint holds."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from sd3_jax import tree
from sd3_jax.distributed import sharding


@struct.dataclass
class TrainState:
    """Arrays only, so that it can be donated, sharded and saved as one tree."""

    step: Array
    params: dict
    ema: dict
    opt_state: optax.OptState


def init_state(key: Array, init_params, tx: optax.GradientTransformation):
    """A new state; `init_params(key)` gives params, boxed or not."""
    params = tree.unbox(init_params(key))
    # A copy: two leaves that are one buffer cannot both be donated.
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, tx.init(params))


def abstract_state(key: Array, init_params, tx, mesh) -> TrainState:
    """init_state's shapes and dtypes, each with its sharding on the mesh."""
    boxed = jax.eval_shape(init_params, key)  # boxes carry the logical axis names
    params = tree.unbox(boxed)
    sharded = sharding.shardings(boxed, mesh)
    state = jax.eval_shape(lambda key: init_state(key, init_params, tx), key)
    # The average and the moments have no boxes: they follow their parameter by path.
    state_shardings = sharding.like_params(state, params, sharded, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings,
    )
