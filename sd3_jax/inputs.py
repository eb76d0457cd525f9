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
# owner/name, owner/name@revision, owner/name/file.safetensors
HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?(/[\w./@-]+)?")


def check(job: str, values: Mapping[str, Any]) -> None:
    """UserError for the first of a job's keys that names what cannot be there; `values`
    are the config's leaves by their dotted keys."""
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
    if exists(text):
        return ""
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        return (
            "a URL, which is not downloaded: wanted a path, or a hub name such as"
            " owner/name or owner/name/file.safetensors"
        )
    first, _, rest = text.partition("/")
    repository = "/" in rest or not rest.endswith(".safetensors")
    if HUB.fullmatch(text) and repository and not os.path.isdir(first):
        return ""
    return "no such file, folder or hub name"


def models(text: str) -> str:
    """The same of several with commas between; a path may have commas in it."""
    if exists(text):
        return ""
    each = [part.strip() for part in text.split(",")]
    wrong = [(part, reason) for part in each if (reason := model(part))]
    if not wrong:
        return ""
    part, reason = wrong[0]
    return f'"{part}": {reason}' if len(each) > 1 else reason


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
KEYS: tuple[tuple[str, tuple[str, ...], Callable[[str], str]], ...] = (
    ("weights", LOADED, models),
    ("tokenizers", LOADED, model),
    ("sample.lora", (*PAINTED, "convert"), weighed),
    ("sample.prompts_file", ("sample",), file),
    ("encode.weights", ENCODED, models),
    ("encode.tokenizers", ENCODED, model),
)
