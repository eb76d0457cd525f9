"""Looking at files at any path of epath, where epath's own answers mislead.

Of a local path, epath's `exists` says no where the disk fails, and its `stat` asks for
the names of owner and group, which fails for an owner without a passwd entry: on a
network disk, in a container.
"""

import os
import stat

from etils import epath

from sd3_jax.errors import UserError


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


def remote(path: epath.PathLike) -> bool:
    """Whether the path is of an object store: gs://, s3://."""
    return "://" in os.fspath(path)
