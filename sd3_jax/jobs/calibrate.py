"""Measure the curve that the step cache magcache follows, on the prompts of `sample`.

    sd3-jax calibrate --config=released --workdir=DIR --config.weights=PATH
        --config.sample.prompts_file=FILE

It writes WORKDIR/calibration.json, which config.sample.cache_calibration and
sd3_jax.generate(..., cache_calibration=) read.
"""

import logging

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.distributed import sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.models.step_cache import CALIBRATION, Record
from sd3_jax.sampling import cache_calibration, compiled
from sd3_jax.sampling.job import painters, prompt_file
from sd3_jax.sampling.job.task_batches import batches, filled

log = logging.getLogger(__name__)
FILE = "calibration.json"


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Paint the prompts without a cache and write the mean of their curves."""
    workdir = epath.Path(workdir)
    config = config.copy_and_resolve_references()
    # A method that the config's rule does not offer: it computes all and measures.
    config.sample.update(cache=CALIBRATION.name, cache_options="", cache_calibration="")
    tasks = prompt_file.tasks(config)
    if steps := {task.settings["steps"] for task in tasks} - {config.sample.steps}:
        raise UserError(
            f"a prompt has {min(steps)} steps and config.sample.steps ="
            f" {config.sample.steps}: a curve is of one number of steps"
        )
    curves: list[np.ndarray] = []

    def keep(record: Record) -> None:
        curves.append(np.asarray(record.measures))

    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        load = painters.released if config.weights else painters.trained
        # `keep` gets the record of each batch that is painted.
        painter = load(config, workdir, mesh, tasks, keep)
        reasons = dict(painter.unfit)
        for batch, size in batches(
            tasks, config.sample.batch_size, mesh, painter.program
        ):
            watchdog.expect("a batch of pictures", watchdog.LONG)
            reasons |= painter.paint(filled(batch, size))[1]
        # A curve of fewer prompts than asked for would not say so.
        if reasons:
            raise UserError(f"a prompt cannot be painted: {min(reasons.values())}")
        about = dict(steps=config.sample.steps, pictures=len(tasks))
        about |= dict(cfg=config.sample.cfg, weights=config.weights or "checkpoint")
        # Rows that fill up a batch repeat prompts, which weigh twice in its curve.
        calibration = cache_calibration.mean(painter.denoiser(), curves, **about)
    if jax.process_index() == 0:
        cache_calibration.write(workdir / FILE, calibration)
        print(workdir / FILE)
