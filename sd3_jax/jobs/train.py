"""Train, or go on from the last checkpoint: the same call does either."""

import os
import time

import jax
from etils import epath
from flax import linen as nn
from ml_collections import ConfigDict

from sd3_jax.distributed import lock, sharding, watchdog
from sd3_jax.monitoring import writers
from sd3_jax.monitoring.goodput import Goodput
from sd3_jax.training import trainer
from sd3_jax.training.profiler import require_sound_profiler


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Leaves metrics.jsonl, samples/, checkpoints/ and config.json in workdir."""
    goodput = Goodput(float(os.environ.pop("SD3_BEGAN", time.time())))  # see main
    workdir = epath.Path(workdir)
    trainer.refuse_sample_step(config, workdir)
    watchdog.expect("the start of the run", watchdog.LONG)
    if jax.process_index() == 0:
        writers.clients(config.train.writers)  # what is missing is told at once
    if config.profile.start:
        require_sound_profiler()
    mesh = sharding.make_mesh(**config.mesh)
    with (
        lock.held(workdir, "train"),
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
    ):
        training = trainer.Training(config, workdir, mesh, goodput)
        try:
            training.run()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(training.interrupted()) from None
