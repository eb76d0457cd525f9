"""Parse how users name models: paths, lists, hub names, links and LoRA weights.

Hub names are owner/name, owner/name@revision, owner/name:variant and, for one file,
owner/name/file.safetensors or owner/name@revision/file.safetensors. Only the standard
library is imported: the command line asks before jax is imported.
"""

import os
import re
from collections.abc import Callable
from typing import NamedTuple

BUCKETS = ("gs://", "s3://", "az://")  # which epath opens
REMOTE = (*BUCKETS, "hf://")
# Branches and tags without slashes, and the hub's refs/pr/N and refs/convert/NAME.
REVISION = r"@(refs/(?:pr|convert)/[\w.-]+|[\w.-]+)"
FILES = (".safetensors", ".gguf")  # of which a hub name may name one
NAME = re.compile(
    rf"(\w[\w.-]*/[\w.-]+)(?:{REVISION})?"
    rf"(?:(/[^@:]+\.(?:safetensors|gguf))(?:{REVISION})?|:([\w-]+))?"
)
PLACES = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?!datasets/|spaces/)"
LINK = re.compile(PLACES + r"([^/?#]+/[^/?#]+)(?:/(?:blob|resolve|tree)/([^?#]+))?.*")


class Name(NamedTuple):
    """A hub name; revision None is the default branch, file "" the whole repository."""

    repo: str
    revision: str | None = None
    file: str = ""
    variant: str = ""


def parse(text: str) -> Name | None:
    """The hub name that a text is, or None."""
    match = NAME.fullmatch(text.removeprefix("hf://"))
    # folder/file.safetensors looks like owner/name, and is a path.
    if match is None or match[1].endswith(FILES):
        return None
    repo, before, file, after, variant = match.groups()
    if before and after:  # two revisions
        return None
    return Name(repo, before or after, (file or "").lstrip("/"), variant or "")


def parse_absent(path: str) -> Name | None:
    """The hub name of a path that does not exist, or None."""
    # Below an existing folder it is a mistyped path, not a name to look up on the hub.
    name = parse(path)
    if name is not None and name.file and os.path.isdir(path.partition("/")[0]):
        return None
    return name


def link(url: str) -> str | None:
    """The hub name that a browser's link to the hub leads to, or None."""
    match = LINK.fullmatch(url)
    if match is None:
        return None
    # blob, resolve and tree pages have the revision first.
    revision, _, file = (match[2] or "main").partition("/")
    at = "" if revision == "main" else f"@{revision}"
    return match[1] + at + (f"/{file}" if file.endswith(FILES) else "")


def split(text: str, exists: Callable[[str], bool]) -> list[str]:
    """The sources in a comma-separated text; an existing name with commas is one."""
    # The longest run of pieces that exists is taken first.
    pieces, sources = text.split(","), []
    while pieces:
        joined = (",".join(pieces[:n]) for n in range(len(pieces), 1, -1))
        whole = next(filter(exists, joined), None)
        sources.append(pieces[0].strip() if whole is None else whole)
        pieces = pieces[1 if whole is None else whole.count(",") + 1 :]
    return sources


def split_variant(text: str) -> tuple[str, str]:
    """(path, variant) of "folder:fp16"; the variant is "" if there is none."""
    path, _, variant = text.rpartition(":")
    return (path, variant) if path and re.fullmatch(r"[\w-]+", variant) else (text, "")


def split_weight(text: str, exists: Callable[[str], bool]) -> tuple[str, float]:
    """(path, weight) of a LoRA: "path=0.8", or "path" with weight 1.

    An existing path such as "step=1000" has no weight in its name; "step=1000=0.5" is
    that path with weight 0.5.
    """
    path, equals, number = text.rpartition("=")
    if not equals or exists(text):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:  # an "=" within the name
        return text, 1.0


def split_token(text: str, exists: Callable[[str], bool]) -> tuple[str, str | None]:
    """(path, placeholder) of an embedding: "path=<token>", or "path" with None.

    An existing path with "=" in its name has no placeholder.
    """
    path, equals, token = text.rpartition("=")
    return (path, token) if equals and not exists(text) else (text, None)
