"""Looking at files at any path of epath, where epath's own answers mislead.

Of a local path, epath's `exists` says no where the disk fails, and its `stat` asks for
the names of owner and group, which fails for an owner without a passwd entry: on a
network disk, in a container.
"""

import os
import stat
from pathlib import Path
from typing import Any

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.outside import parse_json, shown


def exists(path: epath.PathLike) -> bool:
    """Whether the path exists; OSError where that cannot be told."""
    if remote(path):
        return epath.Path(path).exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(path: epath.PathLike) -> int:
    """The bytes of a file; OSError if it cannot be told."""
    if remote(path):
        return epath.Path(path).stat().length or 0
    return os.stat(path).st_size


def children(folder: epath.Path) -> list[epath.Path]:
    """What a folder of ours holds. In a bucket one without files is not there, whatever
    mkdir was told: it holds nothing."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        if not remote(folder):
            raise
        return []


def names(folder: epath.PathLike) -> list[str]:
    """A folder's names, sorted, without hidden ones: macOS keeps ._x beside x."""
    try:
        every = [path.name for path in epath.Path(folder).iterdir()]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: cannot be listed: {reason}") from None
    return sorted(name for name in every if not name.startswith("."))


def require_regular(path: epath.PathLike) -> None:
    """UserError for a pipe or a device, whose reader would wait for ever."""
    try:
        mode = stat.S_IFREG if remote(path) else os.stat(path).st_mode
    except OSError:
        return  # opening it says why
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path} is a pipe, a socket or a device: wanted a file")


def read_bytes(path: epath.PathLike) -> bytes:
    """A small file; UserError if it cannot be read."""
    require_regular(path)
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_object(path: epath.PathLike) -> dict:
    """A small file's JSON object; UserError if it holds none."""
    return parse_object(path, read_bytes(path))


def parse_object(where: Any, text: str | bytes) -> dict:
    """A JSON object; UserError, which names where it lies, for anything else."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {shown(error, 200)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: wanted a JSON object")
    return value


def remote(path: epath.PathLike) -> bool:
    """Whether the path is of an object store: gs://, s3://."""
    return "://" in os.fspath(path)


def shipped(folder: str) -> Path:
    """A folder of the repository, which a wheel holds inside the package (setup.py)."""
    package = Path(__file__).resolve().parent
    inside = package / Path(folder).name
    return inside if inside.is_dir() else package.parent / folder
