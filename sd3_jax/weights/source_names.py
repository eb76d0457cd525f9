"""How users name models: paths, commas between them, the hub's names, links, weights.

owner/name, with a revision owner/name@v1, a variant owner/name:fp16, or of one file
owner/name/file.safetensors, also owner/name@v1/file.safetensors. Nothing here imports
more than the standard library: the command line asks before jax is imported.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

BUCKETS = ("gs://", "s3://", "az://")  # that epath opens
REMOTE = (*BUCKETS, "hf://")
REVISION = r"@(refs/(?:pr|convert)/[\w.-]+|[\w.-]+)"
NAME = re.compile(
    rf"(\w[\w.-]*/[\w.-]+)(?:{REVISION})?"
    rf"(?:(/[^@:]+\.safetensors)(?:{REVISION})?|:([\w-]+))?"
)
PLACES = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)"
LINK = re.compile(PLACES + r"([^/?#]+/[^/?#]+)(?:/(?:blob|resolve|tree)/([^?#]+))?.*")


class Name(NamedTuple):
    repo: str
    revision: str | None = None
    file: str = ""
    variant: str = ""


def parse(text: str) -> Name | None:
    """A hub's name; None for what is none."""
    match = NAME.fullmatch(text.removeprefix("hf://"))
    if match is None or match[1].endswith(".safetensors"):
        return None
    repo, before, file, after, variant = match.groups()
    if before and after:
        return None
    return Name(repo, before or after, (file or "").lstrip("/"), variant or "")


def parse_absent(path: str) -> Name | None:
    """The hub's name that a path may be which is not there. One below a folder that
    is there is the path of a file that was meant to be in it."""
    name = parse(path)
    if name is not None and name.file and os.path.isdir(path.partition("/")[0]):
        return None
    return name


def link(url: str) -> str | None:
    """The name of what a link to the hub leads to."""
    match = LINK.fullmatch(url)
    if match is None:
        return None
    revision, _, file = (match[2] or "main").partition("/")
    at = "" if revision == "main" else f"@{revision}"
    return match[1] + at + (f"/{file}" if file.endswith(".safetensors") else "")


def split(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The sources that a text with commas names. What exists by a name with a comma in
    it is one."""
    pieces, sources = text.split(","), []
    while pieces:
        joined = (",".join(pieces[:n]) for n in range(len(pieces), 1, -1))
        whole = next(filter(exists, joined), None)
        sources.append(pieces[0].strip() if whole is None else whole)
        pieces = pieces[1 if whole is None else whole.count(",") + 1 :]
    return sources


def split_variant(text: str) -> tuple[str, str]:
    """(path, variant) of "folder:fp16"; the variant is "" where there is none."""
    path, _, variant = text.rpartition(":")
    return (path, variant) if path and re.fullmatch(r"[\w-]+", variant) else (text, "")


def split_weight(text: str, exists: Callable[[str], bool]) -> tuple[str, float]:
    """Where a LoRA lies and its weight: "path=0.8", or "path", which is times 1.

    What is there by the whole name, such as "step=1000", has no weight in its name;
    "step=1000=0.5" weighs it.
    """
    path, equals, number = text.rpartition("=")
    if not equals or exists(text):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:  # the name has that sign in it
        return text, 1.0
