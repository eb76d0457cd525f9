"""Listing of folders and sizes of files, on a local file system or in a bucket."""

import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from sd3_jax import files

FILE, FOLDER, LINK, OTHER = "file", "folder", "link to a folder", "other"
THREADS = 32  # that ask a bucket for sizes, at a request each


class Entry(NamedTuple):
    name: str
    kind: str


def entries(folder: str) -> list[Entry]:
    """The entries of a folder that are not hidden, in order of name; or an OSError."""
    if files.remote(folder):
        names = [path.name for path in epath.Path(folder).iterdir()]
        with ThreadPoolExecutor(THREADS) as threads:
            looks = threads.map(look, [join(folder, name) for name in names])
        listed = [Entry(name, kind) for name, (kind, *_) in zip(names, looks)]
    else:
        with os.scandir(folder) as scanned:
            listed = [Entry(entry.name, _kind(entry)) for entry in scanned]
    return sorted(entry for entry in listed if not entry.name.startswith("."))


def look(path: str) -> tuple[str, int, int]:
    """(kind, bytes, mtime in ns) of a path, links followed.

    Bytes are 0 of what is not a regular file. (OTHER, -1, -1) if it does not exist.
    """
    # os.stat for local files: epath's stat looks the owner's name up, and fails where
    # the owner has none, as in many containers.
    try:
        if files.remote(path):
            status = epath.Path(path).stat()
            kind = FOLDER if status.is_directory else FILE
            return kind, status.length or 0, int(status.mtime or 0) * 10**9
        status = os.stat(path)
    except (OSError, ValueError) as error:
        files.require_answered(path, error)
        return OTHER, -1, -1
    kinds = {stat.S_IFREG: FILE, stat.S_IFDIR: FOLDER}
    kind = kinds.get(stat.S_IFMT(status.st_mode), OTHER)
    return kind, status.st_size if kind == FILE else 0, status.st_mtime_ns


def stats(paths: list[str]) -> list[tuple[int, int]]:
    """(bytes, mtime in ns) of files, -1 for those that do not exist."""
    if paths and files.remote(paths[0]):
        with ThreadPoolExecutor(THREADS) as threads:
            return [row[1:] for row in threads.map(look, paths)]
    return [look(path)[1:] for path in paths]


def resolved(path: str) -> str:
    """A path with links resolved: equal for two spellings of one place."""
    return path if files.remote(path) else os.path.realpath(path)


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}" if folder and name else folder or name


def digest(*values) -> str:
    """A short hash of values such as names and sizes."""
    # json.dumps escapes what UTF-8 cannot spell: names that are no valid text, which
    # Python has as surrogates, have a hash as well.
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _kind(entry: os.DirEntry) -> str:
    if entry.is_symlink():  # os.path: a link to itself is an OSError to the entry
        linked = os.path.isfile(entry.path)
        return FILE if linked else LINK if os.path.isdir(entry.path) else OTHER
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    return FILE if entry.is_file(follow_symlinks=False) else OTHER
