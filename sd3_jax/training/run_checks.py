"""What a run refuses or warns of before it compiles anything."""

import logging
import os

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
LARGE = 2e8  # parameters; so many are not trained on a CPU unless that is meant


def grace_seconds() -> float | None:
    """Seconds from SIGTERM to SIGKILL: SD3_GRACE_S, which launch/job.sh sets."""
    text = os.environ.get("SD3_GRACE_S", "")
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"SD3_GRACE_S = {text}: expected a whole number of seconds")
    return float(text)


def refuse_sample_step(config: ConfigDict, workdir: epath.Path) -> None:
    """UserError for sample.step: `train` resumes from the newest checkpoint only.

    A run that resumed from the middle of its own steps would have to delete the rest.
    """
    if step := config.sample.step:
        raise UserError(
            f"config.sample.step = {step}: train always resumes from the newest"
            " checkpoint. To resume from an earlier one, copy"
            f" {workdir}/checkpoints/{step} to NEW/checkpoints/{step} and train with"
            " --workdir=NEW. To start a new run from its weights, set"
            f" --config.tune.base={workdir}/checkpoints/{step}"
        )


def require_trainable_dtype(config: ConfigDict) -> None:
    """UserError for float16, whose gradients need loss scaling, which is not here.

    A mean over a batch divides each example's gradient by the batch size: at batch 1024
    most of the entries fall below float16's smallest number and are zero.
    """
    if config.model.dtype == "float16":
        raise UserError(
            'config.model.dtype = "float16": gradients would round to zero; set'
            ' "bfloat16" or "float32" to train (float16 is for sampling only)'
        )


def refuse_cpu_by_accident(params: dict) -> None:
    """UserError for a large model on CPUs that nobody asked for.

    JAX falls back to the CPU silently where it finds no accelerator's driver.
    """
    size, platform = tree.count(params), jax.devices()[0].platform
    if platform == "cpu" and size > LARGE and not os.environ.get("JAX_PLATFORMS"):
        raise UserError(
            f"{size / 1e9:.1f} billion parameters, but jax found only CPUs; install"
            " jax[tpu] or jax[cuda12] for their devices, or set JAX_PLATFORMS=cpu to"
            " train on CPUs"
        )


def warn_of_settings(config: ConfigDict) -> None:
    """Log the settings that do not do what their reader may expect."""
    log_average(config)
    warn_of_rate(config)
    warn_of_short_run(config)


def log_average(config: ConfigDict) -> None:
    """Log what `ema` will be, where config.ema does not say it."""
    steps, every = config.train.steps, config.ema.every
    if config.optim.name == "schedule_free":
        log.info(
            "validation, samples and exports take the average of config.optim.name ="
            ' "schedule_free"; config.ema is not used'
        )
    elif steps < every:
        log.warning(
            "config.train.steps = %d, config.ema.every = %d: until its first update"
            " the average follows the weights closely; set --config.ema.every=1 for an"
            " average",
            *(steps, every),
        )


def warn_of_rate(config: ConfigDict) -> None:
    """Warn of a rate that is too small for an optimizer which estimates its own."""
    if config.optim.name == "prodigy" and config.optim.lr < 0.1:
        log.warning(
            'config.optim.lr = %g: config.optim.name = "prodigy" multiplies its'
            " estimated rate by this; 1.0 is usual",
            config.optim.lr,
        )


def warn_of_short_run(config: ConfigDict) -> None:
    """Warn of what the config asks for and a run of train.steps never reaches."""
    train, warmup = config.train, config.optim.warmup
    for name, asked, consequence in (
        ("log_every", True, "metrics.jsonl gets no losses"),
        ("eval_every", config.data.held_out, "the held-out records are never used"),
        ("eval_every", config.data.name == "digits", "the loss is never validated"),
        ("sample_every", train.prompts, "config.train.prompts are never sampled"),
    ):
        if asked and train[name] > train.steps:
            log.warning(
                "config.train.%s = %d is more than config.train.steps = %d: %s; set"
                " --config.train.%s=%d",
                *(name, train[name], train.steps, consequence),
                *(name, max(1, train.steps // 10)),
            )
    if warmup > train.steps:
        log.warning(
            "config.optim.warmup = %d is more than config.train.steps = %d: the"
            " learning rate does not reach config.optim.lr = %g; set"
            " --config.optim.warmup=%d",
            *(warmup, train.steps, config.optim.lr, train.steps // 20),
        )
