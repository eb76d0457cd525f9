"""Train, or go on from the last checkpoint: the same call does either."""

import contextlib
import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from sd3_jax import pictures, sharding
from sd3_jax.evals.val_loss import val_loss
from sd3_jax.jobs import assemble
from sd3_jax.jobs.sample import Painter
from sd3_jax.metrics import PEAK_TFLOPS, Clock, Metrics, write_whole
from sd3_jax.training import optimizer
from sd3_jax.training.checkpoint import Checkpoints
from sd3_jax.training.state import abstract_state, init_state
from sd3_jax.training.step import make_train_step

log = logging.getLogger(__name__)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Leaves metrics.jsonl, samples/, checkpoints/ and config.json in workdir."""
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        Training(config, workdir, mesh).run()


class Training:
    """The loop and what it needs; all that must survive a crash is in the state."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, mesh):
        self.config, self.workdir, self.mesh = config, workdir, mesh
        self.batch_size = config.data.batch_size
        self.rows = sharding.local_rows(mesh, self.batch_size)
        self.key = jax.random.key(config.seed)
        self.parts = assemble.parts(config)
        self.tx, self.rate = optimizer.make(**config.optim, steps=config.train.steps)
        step = make_train_step(
            self.parts.objective.loss,
            self.tx,
            ema_decay=config.ema.decay,
            ema_every=config.ema.every,
            accumulate=config.accumulate,
        )
        self.step = jax.jit(step, donate_argnums=0)
        self.loss_at = jax.jit(self.parts.objective.loss_at)

    def run(self) -> None:
        config = self.config
        with Checkpoints(
            assemble.checkpoints(self.workdir), **config.checkpoint
        ) as checkpoints:
            state, start = self.restore_or_init(checkpoints)
            self.describe(state)
            examples = assemble.loader(config, self.rows, start=start)
            with Metrics(
                self.workdir,
                total_steps=config.train.steps,
                start_step=start,
                process_index=jax.process_index(),
            ) as metrics:
                self.loop(state, start, examples, checkpoints, metrics)

    def restore_or_init(self, checkpoints: Checkpoints):
        """The state, on its devices from birth, and the step it is at."""
        init_params = self.parts.objective.init
        abstract = abstract_state(self.key, init_params, self.tx, self.mesh)
        if checkpoints.latest() is None:
            placed = jax.tree.map(lambda x: x.sharding, abstract)
            init = lambda key: init_state(key, init_params, self.tx)
            return jax.jit(init, out_shardings=placed)(self.key), 0
        state, data, _ = checkpoints.restore(abstract)
        log.info("goes on from step %d of %s", data["next_step"], self.workdir)
        return state, data["next_step"]

    def loop(self, state, start: int, examples, checkpoints, metrics) -> None:
        config, clock = self.config, Clock()
        for step in range(start + 1, config.train.steps + 1):
            with clock.wait():
                batch = next(examples)
            batch = sharding.put(batch, self.mesh, self.batch_size)
            state, values = self.step(state, self.key, batch, {})
            due = lambda every: step % every == 0 or step == config.train.steps
            if step == start + 1:
                jax.block_until_ready(state)  # compiling is no part of a step's time
                clock.reset()
            elif due(config.train.log_every):
                self.log(metrics, clock, step, values, start)
            pause = due(config.train.eval_every) or due(config.train.sample_every)
            if due(config.train.eval_every):
                self.evaluate(metrics, step, state)
            if due(config.train.sample_every):
                self.sample(metrics, step, state)
            last = step == config.train.steps
            checkpoints.save(
                step, state, {"next_step": step}, config.to_dict(), force=last
            )
            if checkpoints.reached_preemption(step):
                log.info("told to stop: saved step %d", step)
                break
            if pause:
                clock.reset()

    def log(self, metrics: Metrics, clock: Clock, step: int, values, start: int):
        steps = min(self.config.train.log_every, step - start - 1)
        values = {name: float(value) for name, value in values.items()}
        images, device = steps * self.batch_size, jax.devices()[0]
        peak = PEAK_TFLOPS.get(device.device_kind)
        rates = clock.summary(
            steps,
            images,
            flops=3 * self.parts.flops * images,
            devices=jax.device_count(),
            peak=peak,
        )
        values["lr"] = float(self.rate(step - 1))
        metrics.write(step, "train", values | rates)
