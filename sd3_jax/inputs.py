"""Whether the files that a config names can be there, asked before jax is imported.

A wrong path is then answered at once. What a file holds, and whether the hub has a
name, is seen when it is opened (pipelines/sources.py).
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from sd3_jax.errors import UserError

REMOTE = ("gs://", "s3://", "az://", "hf://")  # which epath knows
REVISION = r"@[\w.-]+(?:/[\w.-]+)*?"
# owner/name, with a revision @v1, a variant :fp16, or one of its files.
HUB = re.compile(
    rf"\w[\w.-]*/[\w.-]+(?:{REVISION})?"
    rf"(?P<file>/[^@:]+\.safetensors(?:{REVISION})?)?(?::[\w-]+)?"
)
VARIANT = re.compile(r"(.+):[\w-]+")  # of a folder here


def check(job: str, values: Mapping[str, Any]) -> None:
    """UserError for the first of a job's keys that names what cannot be there; `values`
    are the config's leaves by their dotted keys."""
    if values.get("weights") and job in INSTEAD:
        raise UserError(f"config.weights: {job} does not read it: {INSTEAD[job]}")
    for key, jobs, kind in KEYS:
        if job not in jobs or not values.get(key):
            continue
        if key in ("tokenizers", "sample.lora") and not values.get("weights"):
            continue  # of released weights alone
        value = values[key]
        for text in value if isinstance(value, tuple | list) else [value]:
            if reason := kind(text):
                raise UserError(f"config.{key} = {text}: {reason}")


def exists(path: str) -> bool:
    return path.startswith(REMOTE) or os.path.exists(os.path.expanduser(path))


def model(text: str) -> str:
    """Why this names no file, folder or hub's repository; "" if it may."""
    variant = VARIANT.fullmatch(text)
    if exists(text) or (variant and exists(variant[1])):
        return ""
    if re.match(r"https?://(www\.)?(huggingface\.co|hf\.co)/", text):
        return ""  # pipelines/hub.py says which name is meant
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        return (
            "a link, which is not downloaded: wanted a path, or a hub name such as"
            " owner/name or owner/name/file.safetensors"
        )
    hub, first = HUB.fullmatch(text), text.partition("/")[0]
    if hub and hub["file"]:
        hub = not os.path.isdir(first)
    elif hub:
        hub = not text.endswith(".safetensors")
    return "" if hub else "no such file, folder or hub name"


def models(text: str) -> str:
    """The same of several with commas between; a path may have commas in it."""
    parts = text.split(",")
    several = len(parts) > 1
    while parts:
        joined = [",".join(parts[:n]) for n in range(len(parts), 1, -1)]
        whole = next(filter(exists, joined), parts[0])
        if reason := model(whole.strip()):
            return f'"{whole.strip()}": {reason}' if several else reason
        parts = parts[whole.count(",") + 1 :]
    return ""


def weighed(text: str) -> str:
    """The same of a LoRA, which may end in its weight: "path=0.8"."""
    path, equals, weight = text.rpartition("=")
    if equals and not exists(text) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", weight):
        return model(path)
    return model(text)


def file(text: str) -> str:
    return "" if exists(text) else "no such file"


PAINTED = ("sample", "evaluate")
LOADED = (*PAINTED, "convert", "compare", "inspect")
ENCODED = ("train", "precompute", "study")
INSTEAD = {  # what a user of config.weights means there
    "train": "wanted config.tune.base, the weights to start from, or"
    " config.encode.weights, which encode text and pictures",
    "precompute": "wanted config.encode.weights, which encode text and pictures",
}
KEYS: tuple[tuple[str, tuple[str, ...], Callable[[str], str]], ...] = (
    ("weights", LOADED, models),
    ("tokenizers", LOADED, model),
    ("sample.lora", (*PAINTED, "convert"), weighed),
    ("sample.prompts_file", ("sample",), file),
    ("encode.weights", ENCODED, models),
    ("encode.tokenizers", ENCODED, model),
)
