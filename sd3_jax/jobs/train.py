"""Train, or resume from the newest checkpoint: the same call does either."""

import os
import time

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.distributed import lock, sharding, watchdog
from sd3_jax.monitoring import writers
from sd3_jax.monitoring.goodput import Goodput
from sd3_jax.sampling import compiled
from sd3_jax.training import run_checks, trainer
from sd3_jax.training.profiler import require_sound_profiler


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Train; leaves metrics.jsonl, samples/, checkpoints/, config.json in workdir."""
    goodput = Goodput(float(os.environ.pop("SD3_BEGAN", time.time())))  # see main
    workdir = epath.Path(workdir)
    run_checks.refuse_sample_step(config, workdir)
    watchdog.expect("the start of the run", watchdog.LONG)
    if jax.process_index() == 0:
        writers.clients(config.train.writers)  # a missing package is an error now
    if config.profile.start:
        require_sound_profiler()
    mesh = sharding.make_mesh(**config.mesh)
    with lock.held(workdir, "train"), compiled.on(mesh):
        trainer.train(config, workdir, mesh, goodput)
