"""Every key of a config, once: default, rule, one sentence.

Defaults, validation, `--help` and docs/reference/config.md are made from GROUPS.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sd3_jax.config.schema import (
    data_schema,
    evaluation_schema,
    model_schema,
    sampling_schema,
    serve_schema,
    tool_schema,
    training_schema,
    vote_schema,
)
from sd3_jax.config.schema.key_rules import Key


class Group(NamedTuple):
    about: str
    keys: dict  # name -> Key, or a dict of the same


GROUPS = {  # in the order of a config
    "": Group("Keys outside the groups", model_schema.TOP),
    "model": Group("The denoiser", model_schema.MODEL),
    "text": Group("Text and its encoders", model_schema.TEXT_MODEL),
    "image": Group("Pictures, their size and shapes", model_schema.IMAGE),
    "encode": Group("Encoders of pictures and captions", model_schema.ENCODE),
    "flow": Group("Formulation: path, loss and timesteps", training_schema.FLOW),
    "optim": Group("The optimizer", training_schema.OPTIM),
    "ema": Group("The average of the weights", training_schema.EMA),
    "tune": Group("Fine-tuning (docs/how-to/finetune.md)", training_schema.TUNE),
    "mesh": Group("Devices along each axis of the mesh", training_schema.MESH),
    "data": Group(
        "Examples to train on (docs/how-to/prepare_data.md)", data_schema.DATA
    ),
    "ingest": Group("Pictures and captions to read", data_schema.INGEST),
    "precompute": Group("Writing records", data_schema.PRECOMPUTE),
    "dedup": Group("Finding near-duplicates", data_schema.DEDUP),
    "inspect": Group("Looking at records", data_schema.INSPECT),
    "train": Group("The training loop (docs/how-to/train.md)", training_schema.TRAIN),
    "checkpoint": Group("Which checkpoints are saved", training_schema.CHECKPOINT),
    "profile": Group("An xprof trace", training_schema.PROFILE),
    "sample": Group("Sampling (docs/how-to/sample.md)", sampling_schema.SAMPLE),
    "serve": Group("The HTTP server (docs/how-to/serve.md)", serve_schema.SERVE),
    "quantize": Group("8-bit weights, for inference", model_schema.QUANTIZE),
    "convert": Group("Exporting weights", sampling_schema.CONVERT),
    "plan": Group("TPU slices to plan for", tool_schema.PLAN),
    "compare": Group("Comparing with PyTorch", tool_schema.COMPARE),
    "explore": Group("Looking inside a picture", tool_schema.EXPLORE),
    "vote": Group("Votes on pictures (docs/how-to/vote.md)", vote_schema.VOTE),
    "benchmark": Group(
        "Timing against PyTorch (docs/how-to/profile.md)", tool_schema.BENCHMARK
    ),
    "study": Group(
        "Variants to compare (docs/explanation/research.md)", evaluation_schema.STUDY
    ),
    "eval": Group(
        "Validation and scores (docs/how-to/evaluate.md)", evaluation_schema.EVAL
    ),
}
TOP_LEVEL = (*GROUPS[""].keys, *filter(None, GROUPS))  # what a config is made of


def defaults() -> ConfigDict:
    """A locked config of every key with its default."""
    config = ConfigDict()
    for name, group in GROUPS.items():
        values = _values(group.keys)
        if name:
            config[name] = values
        else:
            config.update(values)
    return config.lock()


def _values(keys: dict) -> dict:
    return {name: _value(entry) for name, entry in keys.items()}


def _value(entry: Key | dict):
    if isinstance(entry, dict):
        return _values(entry)
    # A new placeholder for each config: one that two share would share its value too.
    return entry.default if entry.kind is None else placeholder(entry.kind)


def flat(keys: dict, prefix: str = "") -> Iterator[tuple[str, Key]]:
    """Every key of a group by its dotted name."""
    for name, entry in keys.items():
        if isinstance(entry, dict):
            yield from flat(entry, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", entry


KEYS = {
    key: entry
    for name, group in GROUPS.items()
    for key, entry in flat(group.keys, f"{name}." if name else "")
}


def about(name: str) -> str:
    """What a group, or a key without one, is."""
    return GROUPS[name].about if name in GROUPS else KEYS[name].about
