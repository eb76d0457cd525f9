"""Going on with a run: what may differ from its settings so far, and what must not."""

import inspect
import json
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from sd3_jax.config import validation
from sd3_jax.errors import ConfigError, UserError, nearest
from sd3_jax.training import optimizer

log = logging.getLogger(__name__)
# Keys and groups that change how a run is done, written or looked at, not what it
# computes beyond rounding; and train.steps, which is there to be raised.
FREE_KEYS = (
    *("train", "checkpoint", "profile", "sample", "eval", "mesh"),
    *("convert", "plan", "compare", "ingest", "precompute", "dedup", "inspect"),
    *("study", "quantize.denoiser", "tune.base"),  # whose fingerprint is compared
    *("data.threads", "data.prefetch", "data.bad_records"),
    *("model.remat", "model.unroll", "model.attention"),
)
MODEL_KEYS = ("model", "text", "image.autoencoder", "flow.path")
# Of these, the ones that only matter in training.
TRAINING_KEYS = ("text.dropout", "model.pos_crop", "model.dtype")


def compare(where: Any, saved: dict, config: ConfigDict) -> None:
    """UserError if a setting differs that is neither FREE nor in train.changes."""
    settings, declared = config.to_dict(), tuple(config.train.changes)
    keys = {key for key, _ in validation.leaves(settings)}
    groups = {key.partition(".")[0] for key in keys}
    for name in declared:
        if name not in keys | groups:
            raise ConfigError(
                f'config.train.changes: no key "{name}"{nearest(name, keys | groups)}'
            )
    differences = list(_differences(saved, settings))
    allowed = FREE_KEYS + declared
    if undeclared := [row for row in differences if not within(row[0], allowed)]:
        keys = ",".join(key for key, _, _ in undeclared)
        raise UserError(
            f"{where} was trained with other settings: {spelled(undeclared)}. To go on"
            f" with the new ones say so, --config.train.changes={keys}; else give back"
            " the old ones, or another workdir"
        )
    if differences:
        log.info("goes on with other settings: %s", spelled(differences))


def compare_rate(where: Any, saved: dict, config: ConfigDict, step: int) -> None:
    """UserError if train.steps, at which a decay ends, differs and is not declared.

    The learning rate would jump at the step that the run goes on from. A rate that
    differs for any declared reason is logged.
    """
    old_optim = config.optim.to_dict() | saved.get("optim", {})
    old_steps = saved.get("train", {}).get("steps", config.train.steps)
    old = learning_rate(old_optim, old_steps, step)
    new = learning_rate(config.optim.to_dict(), config.train.steps, step)
    rates = f"the learning rate at step {step} was {old:.3g}, is {new:.3g}"
    decays = "constant" not in (old_optim["schedule"], config.optim.schedule)
    moved = decays and old_steps != config.train.steps
    if moved and not within("train.steps", config.train.changes):
        raise UserError(
            f"{where}: config.train.steps was {old_steps}, is {config.train.steps},"
            f' where the decay of config.optim.schedule = "{config.optim.schedule}"'
            f" ends: {rates}. To go on with the new one say so,"
            " --config.train.changes=train.steps; else give back the old number, or"
            " another workdir"
        )
    if moved or not math.isclose(old, new, rel_tol=1e-5):
        log.warning("%s", rates)


def learning_rate(optim: dict, steps: int, step: int) -> float:
    """Of an update after `step` steps; `optim` may be of another version."""
    known = inspect.signature(optimizer.make).parameters
    options = {name: value for name, value in optim.items() if name in known}
    return float(optimizer.make(**options, steps=steps)[1](step))


def batches_ahead(data: dict, saved: dict, config: ConfigDict) -> int:
    """How many batches the data are ahead of the step, so that no example comes twice.

    `data` is a checkpoint's position, `saved` its config. After another batch size the
    run goes on with the first whole batch of examples that it has not had: among
    buckets, whose turn a batch is depends on its number.
    """
    step, size = data["next_step"], config.data.batch_size
    old_size = saved.get("data", {}).get("batch_size", size)
    examples = data.get("next_batch", step) * old_size
    batch = -(-examples // size)
    if old_size != size:
        log.warning(
            "config.data.batch_size was %d, is %d: %d examples were trained on, the"
            " next is %d",
            *(old_size, size, examples, batch * size),
        )
    return batch - step


def warn(where: Any, saved: dict, config: ConfigDict) -> None:
    """Of settings that make another model of the same weights."""
    if rows := differing(saved, config):
        log.warning("%s was trained with other settings: %s", where, spelled(rows))


def differing(saved: dict, config: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, then, now) of settings that make another model of the same weights."""
    return [
        row
        for row in _differences(saved, config.to_dict())
        if within(row[0], MODEL_KEYS) and not within(row[0], FREE_KEYS + TRAINING_KEYS)
    ]


def compare_data(where: Any, saved: Any, current: Any, config: ConfigDict) -> None:
    """UserError if the run's examples were others, under the same settings."""
    if saved not in (None, current) and "data" not in config.train.changes:
        raise UserError(
            f"{where} was trained on other examples: {json.dumps(saved)}, now"
            f" {json.dumps(current)}. Bring those back, or go on with these and say so:"
            " --config.train.changes=data"
        )


def spelled(rows: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(
        f"config.{key} was {json.dumps(old)}, is {json.dumps(new)}"
        for key, old, new in rows
    )


def _differences(old: dict, new: dict) -> Iterator[tuple[str, Any, Any]]:
    """Keys that only one of them has are of another version of this code."""
    old, new = (dict(validation.leaves(json.loads(json.dumps(x)))) for x in (old, new))
    for key in new:
        if key in old and old[key] != new[key]:
            yield key, old[key], new[key]


def within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
