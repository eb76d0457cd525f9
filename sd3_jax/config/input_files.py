"""Whether the files that a config names can be there, asked before jax is imported.

A wrong path is then answered at once. What a file holds, and whether the hub has a
name, is seen when it is opened (weights/sources.py).
"""

import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from sd3_jax.errors import UserError
from sd3_jax.weights import source_names


def check(job: str, values: Mapping[str, Any]) -> None:
    """UserError for the first of a job's keys that names a missing file; `values`
    are the config's leaves by their dotted keys."""
    if values.get("weights") and job in INSTEAD:
        raise UserError(f"config.weights: {job} does not use it; {INSTEAD[job]}")
    for key, jobs, kind in KEYS:
        if job not in jobs or not values.get(key):
            continue
        if key in ("tokenizers", "sample.lora") and not values.get("weights"):
            continue  # of released weights alone
        value = values[key]
        for text in value if isinstance(value, tuple | list) else [value]:
            if reason := kind(text):
                raise UserError(f"config.{key} = {text}: {reason}")


def require_drivers(values: Mapping[str, Any]) -> None:
    """UserError for the first value, by its flag, that names a bucket which nothing
    installed here can read."""
    for name, value in values.items():
        for text in value if isinstance(value, tuple | list) else [value]:
            for scheme, (package, extra) in DRIVERS.items():
                if not isinstance(text, str) or not text.startswith(scheme):
                    continue
                if name.rpartition(".")[2] in ("prompt", "prompts", "negative"):
                    continue
                if importlib.util.find_spec(package) is None:
                    raise UserError(
                        f"--{name}={text}: {scheme} paths need {package}, which is not"
                        f" installed; run {extra}"
                    )


def exists(path: str) -> bool:
    return path.startswith(source_names.REMOTE) or os.path.exists(
        os.path.expanduser(path)
    )


def model(text: str) -> str:
    """Why this names no file, folder or hub's repository; "" if it may."""
    if exists(text) or exists(source_names.split_variant(text)[0]):
        return ""
    if name := source_names.link(text):
        return f'is a link; use "{name}"'
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        return (
            "a link, which is not downloaded: expected a path, or a hub name such as"
            " owner/name or owner/name/file.safetensors"
        )
    known = source_names.parse_absent(text) is not None
    return "" if known else "no such file, folder or hub name"


def models(text: str) -> str:
    """The same of several with commas between; a path may have commas in it."""
    sources = source_names.split(text, exists)
    reasons = ((source, model(source)) for source in sources)
    source, reason = next(filter(lambda pair: pair[1], reasons), ("", ""))
    return f'"{source}": {reason}' if reason and "," in text else reason


def weighed(text: str) -> str:
    """The same of a LoRA, which may end in its weight: "path=0.8"."""
    return model(source_names.split_weight(text, exists)[0])


def placed(text: str) -> str:
    """The same of an embedding, which may end in its placeholder: "path=<token>"."""
    return model(source_names.split_token(text, exists)[0])


def file(text: str) -> str:
    if os.path.isdir(os.path.expanduser(text)):
        return "is a folder, expected a file"
    return "" if exists(text) else "no such file"


def folder(text: str) -> str:
    if os.path.isfile(os.path.expanduser(text)):
        return "is a file, expected a folder"
    return "" if exists(text) else "no such folder"


DRIVERS = {  # of etils.epath, by what a path of theirs begins with
    "gs://": ("gcsfs", 'pip install gcsfs (the extras "gcs" and "tpu" have it)'),
    "s3://": ("s3fs", "pip install s3fs"),
}
PICTURED = ("sample", "calibrate")
PAINTED = (*PICTURED, "evaluate", "serve")
LOADED = (*PAINTED, "convert", "compare", "inspect", "explore")
ENCODED = ("train", "precompute", "study", "convert")
INSTEAD = {  # what a user of config.weights means there
    "train": "set config.tune.base, the weights to start from, or"
    " config.encode.weights, which encode text and pictures",
    "precompute": "set config.encode.weights, which encode text and pictures",
}
KEYS: tuple[tuple[str, tuple[str, ...], Callable[[str], str]], ...] = (
    ("weights", LOADED, models),
    ("tokenizers", LOADED, model),
    ("sample.lora", (*PAINTED, "convert", "explore"), weighed),
    ("sample.embeddings", (*PAINTED, "explore", *ENCODED), placed),
    ("sample.prompts_file", (*PICTURED, "explore"), file),
    ("eval.prompts_file", ("evaluate",), file),
    ("sample.images", PICTURED, folder),
    ("sample.image", PICTURED, file),
    ("sample.mask", PICTURED, file),
    ("sample.cache_calibration", ("sample", "evaluate"), file),
    ("vote.prompts", ("vote",), file),
    ("sample.from", ("sample",), file),
    ("serve.keys_file", ("serve",), file),
    ("tune.lora", ("train",), weighed),
    ("encode.weights", ENCODED, models),
    ("encode.tokenizers", ENCODED, model),
)
