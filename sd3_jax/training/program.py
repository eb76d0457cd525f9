"""A config's training program on a mesh: modules, optimizer and step, no arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import examples, finetune_start, model_parts
from sd3_jax.distributed import sharding
from sd3_jax.training import optimizer
from sd3_jax.training.finetuning import Tuning
from sd3_jax.training.run_checks import require_trainable_dtype
from sd3_jax.training.state import TrainState, abstract_state, init_state
from sd3_jax.training.step import make_train_step


class Program(NamedTuple):
    """The jitted step of a config on a mesh, and the state that it takes.

    It holds no arrays, so `plan` builds it for devices that do not exist.
    """

    parts: model_parts.Parts
    tuning: Tuning
    tx: optax.GradientTransformation
    rate: Callable  # learning rate by step
    abstract: TrainState  # shapes, dtypes and shardings
    step: Callable  # jitted; donates the state

    @property
    def shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)


def build_program(config: ConfigDict, mesh: Mesh) -> Program:
    """The training program; UserError for a config that cannot train."""
    require_trainable_dtype(config)
    parts = model_parts.build_parts(config)
    method, heads = parts.denoiser.context_attention, parts.denoiser.num_heads
    sharding.require_context(method, heads, mesh)
    tuning = finetune_start.build_tuning(config, parts.objective)
    optim = config.optim.to_dict()
    accumulate = optim.pop("accumulate")
    tx, rate = optimizer.make(**optim, steps=config.train.steps)
    step = make_train_step(
        tuning.loss,
        tx,
        ema_decay=config.ema.decay,
        ema_every=config.ema.every,
        accumulate=accumulate,
        prepare_batch=tuning.prepare_batch,
    )
    # A key's shape alone: `plan` has no device to make one on.
    key = jax.eval_shape(lambda: jax.random.key(0))
    abstract = abstract_state(key, tuning.init, tx, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    # The old state is donated: a step needs the memory of one state, not of two. That
    # takes outputs in the shardings of the inputs, which the compiler would else pick.
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return Program(parts, tuning, tx, rate, abstract, step)


def initial_state(
    program: Program, key: jax.Array, *, base: dict, adapter: dict
) -> TrainState:
    """A new state; `base` are the weights to start from and `adapter` a LoRA, or {}."""

    def start(key: jax.Array, base: dict, adapter: dict) -> TrainState:
        def init_params(key):
            params = program.tuning.start(key, base)
            return finetune_start.adapted(params, adapter) if adapter else params

        return init_state(key, init_params, program.tx)

    # Under jit with shardings, so that no device has to hold a whole sharded parameter.
    return jax.jit(start, out_shardings=program.shardings)(key, base, adapter)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of the recipe's size, on the mesh."""
    batch_sharding = sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding),
        examples.nominal(config),
    )
