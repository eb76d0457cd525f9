"""Looking at files at any path of epath, where epath's own answers mislead.

Of a local path, epath's `exists` says no where the disk fails, and its `stat` asks for
the names of owner and group, which fails for an owner without a passwd entry: on a
network disk, in a container.
"""

import os

from etils import epath


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


def remote(path: epath.PathLike) -> bool:
    """Whether the path is of an object store: gs://, s3://."""
    return "://" in os.fspath(path)
