"""One verb a file, each with run(config, workdir); imported when it is called."""

from typing import NamedTuple


class Job(NamedTuple):
    """`recipe` and `workdir` are what it takes where the flags are left out."""

    help: str  # a line of `sd3-jax --help`
    recipe: str = ""
    workdir: str = ""
    groups: tuple[str, ...] = ()  # of the config's keys, those that it reads
    about: str = ""  # what `sd3-jax JOB --help` adds to `help`
    example: str = ""


# What makes a model and its pictures: a job that restores a run builds them anew.
MODEL = ("model", "text", "image", "flow")
TRAINING = ("optim", "ema", "tune", "mesh", "data", "train", "checkpoint", "profile")

JOBS = {  # by name, which is also that of the module in sd3_jax.jobs
    "train": Job(
        "train a model, or resume from WORKDIR's newest checkpoint",
        groups=("seed", *MODEL, "encode", *TRAINING, "sample", "quantize", "eval"),
        about="The same command starts a run and resumes it after an interruption.",
        example="sd3-jax train --config=configs/quickstart.py"
        " --workdir=runs/quickstart",
    ),
    "sample": Job(
        "turn prompts into pictures",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh", "train")
        + ("sample", "quantize"),
        about="The weights are those of WORKDIR's checkpoint, or released ones"
        " (config.weights). WORKDIR/samples gets PNG files, samples.jsonl a line for"
        " each. Of the group train it reads prompts.",
        example="sd3-jax sample --config=configs/quickstart.py"
        " --workdir=runs/quickstart \\\n"
        '    --config.sample.prompt="a blue four"',
    ),
    "evaluate": Job(
        "score a checkpoint",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh", "data")
        + ("sample", "quantize", "eval"),
        about="It prints a table of config.eval.scores and keeps it in scores.json."
        " The weights are those of WORKDIR's checkpoint, or released ones"
        " (config.weights).",
        example="sd3-jax evaluate --config=configs/quickstart.py"
        " --workdir=runs/quickstart",
    ),
    "study": Job(
        "compare variants of a recipe over seeds, as the paper's tables do",
        groups=("seed", "tokenizers", *MODEL, "encode", *TRAINING, "sample")
        + ("quantize", "study", "eval"),
        about="Each variant and seed is trained in WORKDIR/runs and scored. What is"
        " done is not done again. It leaves study.html, study.md and study.json.",
        example="sd3-jax study --config=configs/backbones.py:study"
        " --workdir=runs/backbones",
    ),
    "convert": Job(
        "write weights in another layout: diffusers, original or orbax",
        groups=("weights", "tokenizers", *MODEL, "mesh", "sample", "convert"),
        about="The weights are those of WORKDIR's checkpoint, or released ones"
        " (config.weights). Of the group sample it reads weights, step, shift and"
        " lora.",
        example="sd3-jax convert --config=configs/released.py --workdir=runs/out"
        " --config.weights=PATH \\\n    --config.convert.to=original",
    ),
    "compare": Job(
        "lay PyTorch's numbers beside ours, layer by layer",
        recipe="configs/compare.py",
        workdir="runs/compare",
        groups=("seed", "weights", "tokenizers", "image", "mesh", "sample", "compare"),
        about="It needs the extra torch. Without config.weights it compares small"
        " random models. It leaves compare.json and compare.html; the exit code is 1 if"
        " a layer departs.",
        example="sd3-jax compare --config.weights=PATH",
    ),
    "benchmark": Job(
        "time us and PyTorch in turn, on the same shapes and weights",
        recipe="configs/benchmark.py",
        workdir="runs/benchmark",
        groups=("seed", "model", "text", "image", "optim", "ema", "data", "train")
        + ("sample", "benchmark"),
        about="It leaves benchmark.json, benchmark.md and benchmark.svg; the exit code"
        " is 1 if the two disagree, or a ratio is worse than config.benchmark.guard"
        " allows.",
        example="sd3-jax benchmark --config=configs/benchmark.py:gpu",
    ),
    "precompute": Job(
        "turn pictures and captions into records: latents and embeddings, in buckets",
        groups=("seed", "model", "text", "image", "encode", "mesh", "data")
        + ("ingest", "precompute", "quantize"),
        about="Training reads these records from WORKDIR/records. A job that was"
        " killed, started again, does the parts that are not done.",
        example="sd3-jax precompute --config=configs/sd3_2b.py:512 --workdir=runs/data"
        " \\\n    --config.ingest.inputs=PICTURES --config.encode.weights=RELEASED",
    ),
    "dedup": Job(
        "find near-duplicates among pictures",
        groups=("ingest", "dedup"),
        about="It leaves duplicates.jsonl, which precompute takes as"
        " config.ingest.exclude, and a page of pairs. Of the group ingest it reads"
        " inputs.",
        example="sd3-jax dedup --config=configs/sd3_2b.py:512 --workdir=runs/dedup \\\n"
        "    --config.ingest.inputs=PICTURES",
    ),
    "inspect": Job(
        "say what records hold, with a contact sheet of some",
        groups=("weights", "model", "data", "inspect"),
        about="The shards are those of config.data, or WORKDIR/records. It prints a"
        " table and leaves inspect.html; the exit code is 1 if a record is bad.",
        example="sd3-jax inspect --config=configs/sd3_2b.py:512 --workdir=runs/data",
    ),
    "plan": Job(
        "plan a TPU run without a TPU: memory, time and limits of the compiled step",
        groups=("seed", *MODEL, "optim", "ema", "tune", "mesh", "data", "train")
        + ("sample", "quantize", "plan"),
        about="It needs libtpu and no TPU. It prints a row for each slice: memory, the"
        " least times of matrix products, HBM and links, and which of them binds.",
        example="sd3-jax plan --config=configs/sd3_8b.py:1024 --workdir=runs/plan \\\n"
        "    --config.plan.slices=v5e-256,v5p-128",
    ),
    "report": Job(
        "plot what WORKDIR holds, as one page",
        about="The page, report.html, has scores, samples, curves and settings of the"
        " run, and needs no other file.",
        example="sd3-jax report --config=configs/quickstart.py"
        " --workdir=runs/quickstart",
    ),
}
