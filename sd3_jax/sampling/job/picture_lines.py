"""The line of JSON of each picture of `sample`, in samples.jsonl and in the picture."""

import hashlib
import json
import logging
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from PIL import Image

from sd3_jax import pictures
from sd3_jax.data.images import BadImage, read_own
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import parse_json, shown

log = logging.getLogger(__name__)
LINES = "samples.jsonl"
# What is known of a picture once it is painted: the filter's verdict, and its row in
# its batch and the batch's size.
PAINTED = ("filtered", "batch")
# Facts of a line that say where the picture is, not what it shows.
PLACES = ("file", *PAINTED)
ROWS = 4096  # of a batch that is repeated: api.generate's limit
# Not compared when a picture is repeated: the format is the command's choice.
ENCODING = ("quality",)
EXIF = 65_000  # bytes of a comment that a JPEG holds
FIELDS = {"prompt": (str, list), "number": int, "seed": int, "settings": dict}
FIELDS |= {"batch": list}
# If any:
FACTS = {"watermark": str, "lora": list, "embeddings": list, "step": int}
FACTS |= {"quantize": dict}


def recorded(workdir: epath.Path, lines: list[dict]) -> list[bool]:
    """Which pictures exist with the same line as now, as process 0 sees them.

    Their lines get what is known of painted pictures.
    """
    done = np.zeros(len(lines), bool)
    if jax.process_index() == 0:
        text = b""
        if (workdir / LINES).is_file():
            text = (workdir / LINES).read_bytes()
        # A job killed as it wrote leaves half a line, or half a letter.
        known_lines = map(parsed, text.decode(errors="replace").split("\n"))
        # The last line of a file counts, as it was written last.
        known = {str(line.get("file")): line for line in known_lines}
        for i, line in enumerate(lines):
            path = workdir / line["file"]
            there = known.get(line["file"], {})
            if unpainted(there) != line and path.is_file():
                there = embedded(path)  # painted, then killed before it had its line
            done[i] = unpainted(there) == line and path.is_file()
            if done[i]:
                line |= there
    # Disks of other hosts may show other files; all must skip the same pictures.
    return multihost_utils.broadcast_one_to_all(done).tolist()


def parsed(text: str) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def unpainted(line: dict) -> dict:
    """The line as it was before the picture was painted."""
    return {name: value for name, value in line.items() if name not in PAINTED}


def embedded(path: epath.Path) -> dict:
    """The line in a picture's metadata, or {}."""
    try:
        return parsed(read_own(path)[1]["sd3_jax"])
    except (KeyError, BadImage):
        return {}


def read(path: epath.PathLike, title: str) -> dict[str, Any]:
    """The line in a picture, to repeat it; UserError if it has none that can be used.

    The sender of the picture wrote the line: its types are checked here, its settings
    where those of a file of prompts are. Its filter is never imported.
    """
    line = embedded(epath.Path(path))
    if not line:
        raise UserError(
            f"{title}: holds no settings; expected a picture that sample wrote"
        )
    present = {name: kind for name, kind in FACTS.items() if name in line}
    for name, kind in (FIELDS | present).items():
        value = line.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(
                f"{title}: {name} {shown(json.dumps(value))}: a line of another version"
                " or program, which cannot be repeated"
            )
    # Padded, so that a shorter list fails below like one of wrong types.
    row, size, *rest = [*line["batch"], None, None][: max(2, len(line["batch"]))]
    # bool is a subclass of int in Python, and true is no row.
    whole = type(row) is int and type(size) is int
    if rest or not whole or not 0 <= row < size <= ROWS:
        raise UserError(
            f"{title}: batch {shown(line['batch'])}: expected row and size,"
            f" at most {ROWS}"
        )
    if line["number"] < 0:
        raise UserError(f"{title}: number {line['number']}: expected 0 or more")
    return line


def encoding(suffix: str, quality: int) -> dict[str, int]:
    """The facts of a file's format; its suffix is in the line's "file"."""
    return {} if suffix == "png" else {"quality": quality}


def warn_of_changes(before: dict, now: dict, path: str) -> None:
    """Logs each fact in which the line of a repeated picture differs."""
    names = [x for x in {**before, **now} if x not in (*PLACES, *ENCODING)]
    changed = [x for x in names if before.get(x) != now.get(x)]
    for name in changed:
        values = [shown(json.dumps(line.get(name)), 200) for line in (before, now)]
        message = "%s: %s was %s and is %s: the picture will differ"
        log.warning(message, path, name, *values)


def save(
    path: epath.Path,
    image: Image.Image | UInt8[np.ndarray, "h w 3"],
    line: dict,
    quality: int,
) -> None:
    """Writes a picture by its path's suffix, with its line."""
    write_whole(path, encoded(image, path.suffix, line, quality, path.name))


def encoded(
    image: Image.Image | UInt8[np.ndarray, "h w 3"],
    suffix: str,
    line: dict,
    quality: int,
    name: str = "picture",
) -> bytes:
    """A picture's file of a suffix such as ".png", with its line."""
    # PNG's tEXt chunks hold Latin-1 and EXIF's comment ASCII: escapes pass through
    # both.
    text = json.dumps(line)  # in ASCII
    if suffix == ".png":
        prompt = line["prompt"]
        info = {"prompt": prompt if isinstance(prompt, str) else prompt[0]}
        return pictures.png(image, info=info | {"sd3_jax": text})
    if suffix == ".jpg" and len(text) > EXIF:
        message = "%s: its settings have %d bytes, a JPEG holds %d: only %s has them"
        log.warning(message, name, len(text), EXIF, LINES)
        text = ""
    return pictures.lossy(image, suffix, quality=quality, comment=text)


def text_of(lines: list[dict]) -> str:
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)


def slug(caption: str) -> str:
    """A file name made of the prompt, without any character that is special."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48]
    return words or hashlib.sha256(caption.encode()).hexdigest()[:8]
