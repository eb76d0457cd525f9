"""Resuming a run: which settings may differ from those it has had, and which not."""

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
# Keys and groups that may differ on resume: they change how a run is executed, written
# or evaluated, but what it computes by rounding at most. train.steps may be raised.
FREE_KEYS = (
    *("train", "checkpoint", "profile", "sample", "eval", "mesh"),
    *("convert", "plan", "compare", "explore", "ingest", "precompute", "dedup"),
    *("inspect", "serve", "vote"),
    *("study", "quantize.denoiser", "tune.base"),  # whose fingerprint is compared
    *("data.threads", "data.prefetch", "data.bad_records"),
    *("model.remat", "model.unroll", "model.attention"),
    "model.context_attention",
)
# Keys that decide what a set of weights computes.
MODEL_KEYS = ("model", "text", "image.autoencoder", "flow.path")
# Of these, the ones that matter in training alone, or by rounding at most.
TRAINING_KEYS = ("text.dropout", "model.pos_crop", "model.dtype")


def compare(where: Any, saved: dict, config: ConfigDict) -> None:
    """UserError if a setting differs that is neither free nor in train.changes."""
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
            f"{where} was trained with other settings: {spelled(undeclared)}. To"
            f" continue with the new ones, set --config.train.changes={keys}; otherwise"
            " use the recipe and variant of that run, or another workdir"
        )
    if differences:
        log.info("continuing with other settings: %s", spelled(differences))


def compare_rate(where: Any, saved: dict, config: ConfigDict, step: int) -> None:
    """UserError if a decay's end, train.steps, differs and is not declared.

    Logs both learning rates at `step` if they differ for a declared reason.
    """
    # train.steps is free otherwise. Under a cosine or linear decay the rate would jump
    # at the step that the run goes on from.
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
            f" ends: {rates}. To continue with the new value, set"
            " --config.train.changes=train.steps; otherwise restore the old one or use"
            " another workdir"
        )
    if moved or not math.isclose(old, new, rel_tol=1e-5):
        log.warning("%s", rates)


def learning_rate(optim: dict, steps: int, step: int) -> float:
    """The learning rate of the update after `step` steps."""
    # A checkpoint of another version may have keys that `make` does not know.
    parameters = inspect.signature(optimizer.make).parameters
    options = {name: value for name, value in optim.items() if name in parameters}
    return float(optimizer.make(**options, steps=steps)[1](step))


def batches_ahead(data: dict, saved: dict, config: ConfigDict) -> int:
    """By how many batches the data are ahead of the step, after a change of batch size.

    `data` is a checkpoint's position, `saved` its config. The run continues with the
    first whole batch of examples that it has not seen.
    """
    step, size = data["next_step"], config.data.batch_size
    old_size = saved.get("data", {}).get("batch_size", size)
    examples = data.get("next_batch", step) * old_size
    # Rounded up: no example comes twice, and a few are skipped. Whole batches, because
    # the bucket of a batch depends on its number.
    batch = -(-examples // size)
    if old_size != size:
        log.warning(
            "config.data.batch_size was %d, is %d: %d examples were trained on, the"
            " next is %d",
            *(old_size, size, examples, batch * size),
        )
    return batch - step


def warn(where: Any, saved: dict, config: ConfigDict) -> None:
    """Warn of settings with which the same weights are another model."""
    if rows := differing(saved, config):
        log.warning("%s was trained with other settings: %s", where, spelled(rows))


def differing(saved: dict, config: ConfigDict) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of settings with which the same weights are another model."""
    return [
        row
        for row in _differences(saved, config.to_dict())
        if within(row[0], MODEL_KEYS) and not within(row[0], FREE_KEYS + TRAINING_KEYS)
    ]


def compare_data(where: Any, saved: Any, current: Any, config: ConfigDict) -> None:
    """UserError if the run's examples were others, though its settings are the same."""
    if saved not in (None, current) and "data" not in config.train.changes:
        raise UserError(
            f"{where} was trained on other examples: {json.dumps(saved)}, now"
            f" {json.dumps(current)}. Restore the old ones, or continue with these by"
            " --config.train.changes=data"
        )


def spelled(rows: Sequence[tuple[str, Any, Any]]) -> str:
    return "; ".join(
        f"config.{key} was {json.dumps(old)}, is {json.dumps(new)}"
        for key, old, new in rows
    )


def _differences(old: dict, new: dict) -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of keys in both whose values differ."""
    # A key that only one has belongs to another version of this code. Through JSON, as
    # the old one was: tuples become lists.
    old, new = (dict(validation.leaves(json.loads(json.dumps(x)))) for x in (old, new))
    for key in new:
        if key in old and old[key] != new[key]:
            yield key, old[key], new[key]


def within(key: str, names: Sequence[str]) -> bool:
    """Whether a key is one of these names, or in a group that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
