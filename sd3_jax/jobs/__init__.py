"""One job a file, each with run(config, workdir); imported when it is called."""

from typing import NamedTuple

from sd3_jax.config import released_keys


class Job(NamedTuple):
    """`recipe` and `workdir` are the defaults of --config and --workdir."""

    help: str  # a line of `sd3-jax --help`
    recipe: str = ""
    workdir: str = ""
    groups: tuple[str, ...] = ()  # groups of keys that it reads, or single keys
    about: str = ""  # what `sd3-jax JOB --help` adds to `help`
    example: str = ""
    unread: tuple[str, ...] = ()  # keys of these groups that it does not read
    action: str = ""  # key that a second word sets: `vote export`

    def reads(self, key: str) -> bool:
        """Whether the job reads a key of the config, such as "optim.lr"."""
        in_groups = key.partition(".")[0] in self.groups or key in self.groups
        return in_groups and key not in self.unread


# What makes a model and its pictures: a job that restores a run builds them.
MODEL = ("model", "text", "image", "flow")
EDITED = tuple(f"sample.{name}" for name in released_keys.EDITED)
# Of `sample` alone: evaluations choose their prompts, and write no pictures.
WRITTEN = tuple(
    f"sample.{name}" for name in "filter watermark from format quality".split()
)
CACHE = ("sample.cache", "sample.cache_options", "sample.cache_calibration")
SCORED = WRITTEN + ("sample.prompt", "sample.prompts_file", "sample.per_prompt")
RELEASED = tuple(f"sample.{name}" for name in released_keys.RELEASED)
TRAINING = ("optim", "ema", "tune", "mesh", "data", "train", "checkpoint", "profile")

JOBS = {  # by name, which is also that of the module in sd3_jax.jobs
    "train": Job(
        "train a model, or resume from WORKDIR's newest checkpoint",
        groups=("seed", *MODEL, "encode", *TRAINING, "sample", "quantize.t5")
        + ("eval.examples", "eval.batch_size"),
        unread=(*SCORED, *RELEASED, "sample.weights"),
        about="The same command starts a run and resumes it after an interruption.",
        example="sd3-jax train --config=configs/quickstart.py"
        " --workdir=runs/quickstart",
    ),
    "sample": Job(
        "generate pictures from prompts",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh")
        + ("train.prompts", "sample", "quantize"),
        about="The weights come from WORKDIR's checkpoint, or from config.weights. It"
        " writes PNG files to WORKDIR/samples and a line for each to samples.jsonl.",
        example="sd3-jax sample --config=configs/quickstart.py"
        " --workdir=runs/quickstart \\\n"
        '    --config.sample.prompt="a blue four"',
    ),
    "serve": Job(
        "answer requests for pictures over HTTP, as OpenAI's Images API",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh")
        + ("sample", "quantize", "serve"),
        unread=(*EDITED, "sample.prompt", "sample.prompts_file", "sample.per_prompt")
        + ("sample.from", "sample.format", *CACHE),
        about="The weights come from WORKDIR's checkpoint, or from config.weights. It"
        " needs the extra serve, and runs until SIGTERM.",
        example="sd3-jax serve --config=configs/released.py:sd35_medium"
        " --workdir=runs/served \\\n    --config.weights=PATH --config.serve.port=8000",
    ),
    "calibrate": Job(
        "measure the curve of a model that the step cache magcache reads",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh")
        + ("train.prompts", "sample", "quantize"),
        unread=WRITTEN + CACHE,
        about="It paints the prompts as sample does, without a cache, and writes the"
        " ratios of magnitudes to WORKDIR/calibration.json. The weights come from"
        " WORKDIR's checkpoint, or from config.weights.",
        example="sd3-jax calibrate --config=released --workdir=runs/calibration \\\n"
        "    --config.weights=PATH --config.sample.prompts_file=FILE",
    ),
    "evaluate": Job(
        "score a checkpoint or released weights",
        groups=("seed", "weights", "tokenizers", *MODEL, "encode", "mesh", "data")
        + ("sample", "quantize", "eval"),
        unread=SCORED,
        about="It prints a table of config.eval.scores and writes it to scores.json."
        " The weights come from WORKDIR's checkpoint, or from config.weights.",
        example="sd3-jax evaluate --config=configs/quickstart.py"
        " --workdir=runs/quickstart",
    ),
    "study": Job(
        "train and compare variants of a recipe over seeds",
        groups=("seed", "tokenizers", *MODEL, "encode", *TRAINING, "sample")
        + ("quantize", "study", "eval"),
        unread=(*SCORED, *RELEASED),
        about="It trains and scores each variant and seed in WORKDIR/runs, and skips"
        " those that are done. It writes study.html, study.md and study.json.",
        example="sd3-jax study --config=configs/backbones.py:study"
        " --workdir=runs/backbones",
    ),
    "convert": Job(
        "write weights in another layout: diffusers, original or orbax",
        groups=("weights", "tokenizers", *MODEL, "mesh", "convert")
        + tuple(f"encode.{name}" for name in ("weights", "tokenizers", "dtype"))
        + tuple(f"sample.{name}" for name in ("weights", "step", "shift", "lora")),
        about="The weights come from WORKDIR's checkpoint, or from config.weights. A"
        " checkpoint is joined with the encoders of config.encode.weights.",
        example="sd3-jax convert --config=configs/released.py --workdir=runs/out"
        " --config.weights=PATH \\\n    --config.convert.to=original",
    ),
    "compare": Job(
        "compare with PyTorch, layer by layer",
        recipe="configs/compare.py",
        workdir="runs/compare",
        groups=("seed", "weights", "tokenizers", "image.height", "image.width", "mesh")
        + ("sample.steps", "sample.cfg", "sample.max_length", "compare"),
        about="It needs the extra torch. Without config.weights it compares small"
        " random models. It writes compare.json and compare.html; the exit code is 1 if"
        " a layer differs.",
        example="sd3-jax compare --config.weights=PATH",
    ),
    "explore": Job(
        "look inside the making of a picture",
        groups=("weights", "tokenizers", "model.dtype", "image.height", "image.width")
        + ("mesh", "train.prompts", "sample", "quantize", "explore"),
        unread=(*EDITED, *WRITTEN, "sample.batch_size"),
        about="It samples with config.weights and writes a page for each picture to"
        " WORKDIR/explore: the latents over the steps, the norms of the blocks, and the"
        " part of the picture that attends to each word.",
        example="sd3-jax explore --config=configs/released.py --workdir=runs/inside"
        ' \\\n    --config.weights=PATH --config.sample.prompt="a red fox"',
    ),
    "benchmark": Job(
        "time sd3_jax and PyTorch on the same shapes and weights",
        recipe="configs/benchmark.py",
        workdir="runs/benchmark",
        groups=("seed", "model", "text.length", "image.height", "image.width", "optim")
        + ("ema.decay", "data.batch_size", "train.steps", "sample.steps", "sample.cfg")
        + ("sample.shift", "benchmark"),
        about="It writes benchmark.json, benchmark.md and benchmark.svg. The exit code"
        " is 1 if the results disagree, or if a ratio is worse than"
        " config.benchmark.guard allows.",
        example="sd3-jax benchmark --config=configs/benchmark.py:gpu",
    ),
    "precompute": Job(
        "encode pictures and captions into records to train from",
        groups=("seed", "model", "text", "image", "encode", "mesh", "ingest")
        + ("precompute", "sample.embeddings", "quantize.t5"),
        about="It writes latents and embeddings, in buckets of shapes, to"
        " WORKDIR/records. If it was interrupted, run the same command to continue.",
        example="sd3-jax precompute --config=configs/sd3_2b.py:512 --workdir=runs/data"
        " \\\n    --config.ingest.inputs=PICTURES --config.encode.weights=RELEASED",
    ),
    "dedup": Job(
        "find near-duplicates among pictures",
        recipe="configs/base.py",
        groups=("ingest.inputs", "dedup"),
        about="It writes duplicates.jsonl, which precompute reads as"
        " config.ingest.exclude, and a page of pairs.",
        example="sd3-jax dedup --workdir=runs/dedup --config.ingest.inputs=PICTURES",
    ),
    "vote": Job(
        "compare pictures of models by votes: a page, results, preferences",
        recipe="configs/base.py",
        groups=("seed", "vote"),
        action="vote.do",
        about="`vote` serves a page where people compare two pictures at a time."
        " `vote results` writes results.json and votes.html; `vote export` writes"
        " records for configs/dpo.py. It needs the extra serve.",
        example="sd3-jax vote --workdir=runs/votes --config.vote.sources=runs/a,runs/b",
    ),
    "inspect": Job(
        "show what records hold, with a contact sheet",
        groups=("weights", "model.dtype", "encode.weights", "data.records")
        + ("data.held_out", "inspect"),
        about="It reads the shards of config.data.records and held_out, or"
        " WORKDIR/records. Without weights it shows latents as rough previews. It"
        " prints a table and writes inspect.html; the exit code is 1 if a record is"
        " bad.",
        example="sd3-jax inspect --config=configs/sd3_2b.py:512 --workdir=runs/data",
    ),
    "plan": Job(
        "plan a TPU run without a TPU: memory, time and bottleneck",
        groups=("seed", *MODEL, "optim", "ema", "tune", "mesh", "data", "train")
        + ("sample", "quantize", "plan"),
        unread=CACHE,
        about="It compiles the training step for each slice, with libtpu. It prints a"
        " row for each: memory, lower bounds on the time of matrix products, HBM and"
        " links, and which of them is the bottleneck.",
        example="sd3-jax plan --config=configs/sd3_8b.py:1024 --workdir=runs/plan \\\n"
        "    --config.plan.slices=v5e-256,v5p-128",
    ),
    "report": Job(
        "write an HTML page about a run",
        recipe="configs/base.py",
        about="The page, WORKDIR/report.html, has the scores, samples, curves and"
        " settings of the run. It needs no other file.",
        example="sd3-jax report --workdir=runs/quickstart",
    ),
}
