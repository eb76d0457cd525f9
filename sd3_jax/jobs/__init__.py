"""One verb a file, each with run(config, workdir); imported when it is called."""

from typing import NamedTuple


class Job(NamedTuple):
    """`recipe` and `workdir` are what it takes where the flags are left out."""

    help: str
    module: str
    recipe: str = ""
    workdir: str = ""


JOBS = {
    "train": Job(
        "train a model, or go on from WORKDIR's last checkpoint",
        "sd3_jax.jobs.train",
    ),
    "sample": Job("turn prompts into pictures", "sd3_jax.jobs.sample"),
    "evaluate": Job("score a checkpoint", "sd3_jax.jobs.evaluate"),
    "study": Job(
        "compare variants of a recipe over seeds, as the paper's tables do",
        "sd3_jax.jobs.study",
    ),
    "convert": Job(
        "write weights in another layout: diffusers, original or orbax",
        "sd3_jax.jobs.convert",
    ),
    "compare": Job(
        "lay PyTorch's numbers beside ours, layer by layer",
        "sd3_jax.jobs.compare",
        recipe="configs/compare.py",
        workdir="runs/compare",
    ),
    "benchmark": Job(
        "time us and PyTorch in turn, on the same shapes and weights",
        "sd3_jax.jobs.benchmark",
        recipe="configs/benchmark.py",
        workdir="runs/benchmark",
    ),
    "precompute": Job(
        "turn pictures and captions into records: latents and embeddings, in buckets",
        "sd3_jax.jobs.precompute",
    ),
    "dedup": Job("find near-duplicates among pictures", "sd3_jax.jobs.dedup"),
    "inspect": Job(
        "say what records hold, with a contact sheet of some", "sd3_jax.jobs.inspect"
    ),
    "plan": Job(
        "compile the step for TPU slices that are not there, and say what bounds it",
        "sd3_jax.jobs.plan",
    ),
    "report": Job("plot what WORKDIR holds, as one page", "sd3_jax.jobs.report"),
}
