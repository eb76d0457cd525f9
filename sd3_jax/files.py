"""Files at any path of epath, where epath's own answers mislead.

For local paths, epath's `exists` is false when the disk fails, and its `stat` looks up
the names of owner and group, which fails for an owner without a passwd entry (network
disks, containers).
"""

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from etils import epath

from sd3_jax.errors import RetryableError, UserError, passing
from sd3_jax.foreign_text import parse_json, shown

log = logging.getLogger(__name__)
PAUSES = (1.0, 4.0)  # seconds before a bucket is asked again
T = TypeVar("T")


def exists(path: epath.PathLike) -> bool:
    """Whether the path exists; OSError if the file system does not answer."""
    if remote(path):
        return epath.Path(path).exists()
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size(path: epath.PathLike) -> int:
    """The bytes of a file; OSError if that is unknown."""
    if remote(path):
        return epath.Path(path).stat().length or 0
    return os.stat(path).st_size


def children(folder: epath.Path) -> list[epath.Path]:
    """The paths in a folder of ours, which exists."""
    # A bucket has no empty folders, whatever mkdir was told: it holds nothing then.
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        if not remote(folder):
            raise
        return []


def sizes(folder: epath.PathLike) -> dict[str, int]:
    """Bytes of the files in a folder, by name; {} if there is no folder.

    One listing of a bucket, not a request a file.
    """
    if not remote(folder):
        try:
            with os.scandir(folder) as entries:
                return {x.name: x.stat().st_size for x in entries if x.is_file()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{folder}: cannot be listed: {reason}") from None

    def list_sizes(store: Any, name: str) -> dict[str, int]:
        try:
            rows = store.ls(name, detail=True)
        except FileNotFoundError:
            return {}
        files_only = (row for row in rows if row["type"] == "file")
        return {row["name"].rpartition("/")[2]: row["size"] for row in files_only}

    return _asked(folder, list_sizes, "cannot be listed")


def names(folder: epath.PathLike) -> list[str]:
    """A folder's names, sorted, without hidden ones; UserError on failure."""
    # macOS keeps a hidden ._x beside x on foreign file systems.
    try:
        every = [path.name for path in epath.Path(folder).iterdir()]
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder}: cannot be listed: {reason}") from None
    return sorted(name for name in every if not name.startswith("."))


def require_regular(path: epath.PathLike) -> None:
    """UserError for a pipe, socket or device, whose reader could wait for ever."""
    try:
        mode = stat.S_IFREG if remote(path) else os.stat(path).st_mode
    except OSError:
        return  # opening it says why
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(
            f"{path} is a pipe, a socket or a device, not a regular file; expected a"
            " file"
        )


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
    """The JSON object in a text; UserError, beginning with `where`, otherwise."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {shown(error, 200)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object")
    return value


def remote(path: epath.PathLike) -> bool:
    """Whether the path is in an object store: gs://, s3://."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> str:
    """The path without ~ and relative parts; a bucket's stays as it is."""
    name = os.fspath(path)
    return name if remote(name) else os.path.abspath(os.path.expanduser(name))


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes start to end of a bucket's object, in one request."""

    def read(store: Any, name: str) -> bytes:
        data = store.cat_file(name, start=start, end=end)
        if len(data) != end - start:
            raise ConnectionError(f"only {len(data)} of {end - start} bytes arrived")
        return data

    return _asked(path, read, "cannot be read")


def read_whole(path: str) -> bytes:
    """A bucket's object, in one request."""

    return _asked(path, lambda store, name: store.cat_file(name), "cannot be read")


def require_answered(path: str, error: Exception) -> None:
    """RetryableError if `error` is a bucket's fault that may pass.

    Such a fault says nothing about the file, which must not be taken for damaged.
    """
    if remote(path) and passing(error):
        raise RetryableError(f"{path}: cannot be read: {_reason(error)}") from error


def write_object(path: epath.PathLike, data: bytes) -> None:
    """Write a bucket's object in one request: all of it, or nothing."""

    write = lambda store, name: store.pipe_file(name, data)
    _asked(path, write, "cannot be written")


def upload(local: epath.PathLike, path: epath.PathLike) -> None:
    """Upload a local file to a bucket; it gets its name once it is complete."""
    length = os.stat(local).st_size

    def put(store: Any, name: str) -> None:
        store.put_file(os.fspath(local), name)
        if (stored := store.info(name)["size"]) != length:
            raise ConnectionError(f"only {stored} of {length} bytes were stored")

    _asked(path, put, "cannot be written")


def retried(call: Callable[[], T], failure: str) -> T:
    """call(), retried after faults of the network or the storage.

    Raises RetryableError if they do not pass, and UserError for what the storage
    refuses; both begin with `failure`. fsspec's clients retry six times themselves.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except Exception as error:
            reason = f"{failure}: {_reason(error)}"
            if not passing(error):
                if isinstance(error, OSError):
                    raise UserError(reason) from error
                raise
            if pause is None:
                raise RetryableError(reason) from error
            log.warning("%s; retrying in %g s", reason, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    """An error's text on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def _asked(path: epath.PathLike, call: Callable[[Any, str], T], failure: str) -> T:
    """call(client, name) of a bucket's object, retried."""
    # A client is asked for anew each time: making one may fail as well.
    return retried(lambda: call(*_store(os.fspath(path))), f"{path}: {failure}")


def _store(path: str) -> tuple[Any, str]:
    """(fsspec's client, its name of the path); there is one client per process."""
    from fsspec.core import url_to_fs  # not needed for local files

    return url_to_fs(path)


def shipped(folder: str) -> Path:
    """A folder of the repository; a wheel has it inside the package (setup.py)."""
    package = Path(__file__).resolve().parent
    inside = package / Path(folder).name
    return inside if inside.is_dir() else package.parent / folder


def write_whole(path: epath.PathLike, data: bytes) -> None:
    """Write a file completely or not at all: beside `path`, then renamed onto it.

    Raises UserError if `path` is a folder.
    """
    # A bucket's objects are complete or absent. A rename there could fail when retried:
    # if the first answer was lost, the old name is gone.
    path = epath.Path(path)
    if remote(path):
        return write_object(path, data)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for name in path, part:
        if name.is_dir():
            raise UserError(
                f"{name} is a folder, but a file of this name is to be written: move"
                " the folder or delete it"
            )
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        # Some network disks refuse fsync; the rename still makes the file complete.
        with contextlib.suppress(OSError):
            os.fsync(file.fileno())
    part.replace(path)
