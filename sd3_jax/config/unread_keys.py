"""Keys that a job, or the values of other keys, leave without effect.

A key that picks another source of data or asks for what a run's sampler cannot do is an
error. Any other that a flag sets is named in one warning.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sd3_jax.config import schema
from sd3_jax.config.validation import as_text
from sd3_jax.errors import UserError
from sd3_jax.jobs import JOBS, RELEASED

log = logging.getLogger(__name__)
RECORDS = ("data.records", "data.held_out", "data.weights")
OF_A_RELEASE = ("tokenizers", *RELEASED)  # a run's own sampler has no such option
# Read only if the value of another key passes; `study` and `benchmark` vary them.
CONDITIONS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    ((*RECORDS, "data.bad_records"), "data.name", lambda x: x == "records"),
    (("data.mix", "data.easy"), "data.name", lambda x: x == "digits"),
    (
        ("text.width", "text.depth", "text.num_heads", "text.words"),
        *("text.name", lambda x: x == "bytes"),
    ),
    (("model.text_split",), "model.weight_sets", lambda x: x == 3),
    (("model.multipliers", "model.attended"), "model.name", lambda x: x == "unet"),
    (("image.aspect",), "image.buckets", lambda x: x > 1),
    (("flow.mean", "flow.std"), "flow.density", lambda x: x == "logit_normal"),
    (("flow.mode_scale",), "flow.density", lambda x: x == "mode"),
    (("optim.muon_lr",), "optim.name", lambda x: x == "muon"),
    (("ema.decay", "ema.every"), "optim.name", lambda x: x != "schedule_free"),
    (("tune.rank", "tune.alpha", "tune.targets"), "tune.method", lambda x: x == "lora"),
    (("tune.text",), "tune.method", lambda x: x == "full"),
    (("tune.beta", "tune.weight"), "tune.objective", lambda x: x == "dpo"),
    (("profile.steps",), "profile.start", lambda x: x > 0),
    (("precompute.only",), "image.autoencoder", lambda x: x == "latents"),
    (("sample.cache_options",), "sample.cache", bool),
    (("sample.cache_calibration",), "sample.cache", lambda x: x == "magcache"),
    (
        ("vote.voters", "vote.again", "vote.host", "vote.port"),
        *("vote.do", lambda x: x == "serve"),
    ),
    (("vote.questions",), "vote.do", lambda x: x != "results"),
    (("vote.held_out",), "vote.do", lambda x: x == "export"),
    (
        ("sample.skip_scale", "sample.skip_start", "sample.skip_stop"),
        *("sample.skip_layers", bool),
    ),
)
VARIED = ("study", "benchmark")
PICTURED = ("sample", "calibrate", "serve")
# What describes a run's model, and released weights bring along.
OF_A_RUN = ("text", "flow", "encode", "sample.weights")


def check(job: str, flags: Iterable[str], values: Mapping[str, Any]) -> None:
    """UserError for what would be lost in silence; a warning that names other flags.

    `flags` are the keys that the command line sets, `values` all keys' values.
    """
    flags = list(flags)
    if job in ("train", "evaluate"):
        require_source(values)
    if job == "train" and "quantize.denoiser" in flags and values["quantize.denoiser"]:
        kind = as_text(values["quantize.denoiser"])
        raise UserError(
            f"config.quantize.denoiser = {kind}: train keeps its weights in full"
            " precision; remove it here, and set it for sample, evaluate or study"
        )
    if job in ("train", "study") and values["sample.cache"] == "magcache":
        raise UserError(
            f'config.sample.cache = "magcache": {job} changes the weights that its'
            " calibration is of; choose first_block or taylorseer, or set it for sample"
        )
    if job in PICTURED and not values["weights"]:
        for key in filter(OF_A_RELEASE.__contains__, flags):
            require_released(f"config.{key}")
    reasons = {key: unread(job, key, values) for key in flags}
    if lost := [f"config.{key} ({why})" for key, why in reasons.items() if why]:
        log.warning("set but not read: %s", ", ".join(lost))


def require_source(values: Mapping[str, Any]) -> None:
    """UserError for records beside a data.name that does not read them."""
    for key in RECORDS:
        if values[key] and values["data.name"] != "records":
            raise UserError(
                f"config.{key} = {as_text(values[key])}: not read, because"
                f" config.data.name = {as_text(values['data.name'])}; set"
                f" --config.data.name=records, or remove config.{key}"
            )


def require_released(name: str) -> None:
    """UserError for an option of released weights beside a run's checkpoint."""
    raise UserError(
        f"{name}: a run's own checkpoint does not read it, released weights do; set"
        f" config.weights to these, or remove {name}"
    )


def unread(job: str, key: str, values: Mapping[str, Any]) -> str:
    """Why a key has no effect; "" if it has one, or is the recipe's own."""
    if key not in schema.KEYS:
        return ""
    if not JOBS[job].reads(key):
        return f"{job} does not read it"
    if job in PICTURED and values["weights"]:
        if key in OF_A_RUN or key.partition(".")[0] in OF_A_RUN:
            return "config.weights is set"
    if job == "evaluate" and not values["weights"] and key in OF_A_RELEASE:
        return "only released weights read it"
    if job in VARIED:
        return ""
    for keys, other, passes in CONDITIONS:
        # An empty value asks for nothing.
        if key in keys and JOBS[job].reads(other) and not passes(values[other]):
            if values[key] not in ((), ""):
                return f"config.{other} = {as_text(values[other])}"
    return ""
