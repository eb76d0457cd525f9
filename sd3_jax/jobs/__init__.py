"""One verb a file, each with run(config, workdir); imported when it is called."""

from typing import NamedTuple


class Job(NamedTuple):
    help: str
    module: str


JOBS = {
    "train": Job(
        "train a model, or go on from WORKDIR's last checkpoint", "sd3_jax.jobs.train"
    ),
    "sample": Job("turn prompts into pictures", "sd3_jax.jobs.sample"),
    "evaluate": Job("score a checkpoint", "sd3_jax.jobs.evaluate"),
    "convert": Job(
        "write weights in another layout: diffusers, original or orbax",
        "sd3_jax.jobs.convert",
    ),
    "report": Job("plot what WORKDIR holds, as one page", "sd3_jax.jobs.report"),
}
