"""Shards: ArrayRecord files of records. A shard is whole, or it has no name.

Each record is a group of its own, so that any record is one read. ArrayRecord opens
local files only: shards are uploaded to a bucket whole, and `ranges` reads them there.
"""

import logging
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)
from etils import epath

from sd3_jax import files
from sd3_jax.data import records
from sd3_jax.data.ranges import RangeReader
from sd3_jax.data.records import Record
from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
OPENERS = 32  # threads that open shards at the start; those of a bucket wait for it


class Writer:
    """Writes one shard, which gets its name once it is whole; an exception leaves none.

    with Writer("train-00000.arecord") as shard:
        shard.write(Record(...))
    """

    def __init__(self, path: epath.PathLike):
        self.path, self.count = epath.Path(path), 0
        self.bytes = 0  # of the whole file, known once it has its name
        self._temporary = None
        if files.remote(self.path):
            # ArrayRecord writes to local paths only; the whole file is uploaded at the
            # end.
            self._temporary = _temporary_file()
            self._partial = epath.Path(_path_of(self._temporary))
        else:
            self._partial = self.path.parent / f"{self.path.name}.partial"
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._failed(error.strerror or error) from None
        # Latents and embeddings do not compress; zstd would cost half of a read.
        options = "group_size:1,uncompressed"
        self._writer = ArrayRecordWriter(os.fspath(self._partial), options)

    def write(self, record: Record) -> None:
        """Add a record; BadRecord if `decode` would refuse it."""
        self.add(records.encode(record))

    def add(self, data: bytes) -> None:
        """Add an encoded record."""
        try:
            self._writer.write(data)
        except RuntimeError as error:
            raise self._failed(error) from None
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            self._writer.close()
            if kind is None:
                self._name_it()
        except RuntimeError as fault:  # a full disk, say
            if kind is None:
                raise self._failed(fault) from None
        finally:
            if self._temporary is None:
                self._partial.unlink(missing_ok=True)
            else:
                self._temporary.close()

    def _name_it(self):
        if not self.count:
            raise self._failed("no record was written to it")
        # Counted in the file before it gets its name, and again after an upload: what
        # was cut off must not show only in training.
        self._require_all(os.fspath(self._partial))
        self.bytes = files.size(self._partial)
        if self._temporary is None:
            # Data before the name: after a crash of the machine a renamed file may
            # otherwise be empty.
            with open(self._partial, "rb") as file:
                os.fsync(file.fileno())
            self._partial.replace(self.path)
        else:
            files.upload(self._partial, self.path)
            self._require_all(os.fspath(self.path))

    def _require_all(self, path: str):
        if (stored := inspect(path).count) != self.count:
            raise self._failed(f"only {stored} of {self.count} records were stored")

    def _failed(self, why) -> UserError:
        return UserError(f"{self.path}: cannot be written: {why}")


class Shard(NamedTuple):
    """A readable shard, and the number of its first record among all shards'."""

    path: str
    file: Any  # identity of the file, equal for two names of one file
    bytes: int
    count: int
    start: int = 0


def expand(pattern: str) -> list[str]:
    """The path itself, or the sorted files that a glob matches; or a UserError."""
    # A file whose name has brackets, "cats [1].tar", is that file and no glob.
    path = epath.Path(pattern).expanduser()
    parts = path.parts
    magic = [i for i, part in enumerate(parts) if re.search(r"[*?[]", part)]
    if not magic or path.exists():
        return [os.fspath(path)]
    if any("**" in part for part in parts):
        raise UserError(
            f"{pattern}: ** is not supported; expected a glob of files in one folder"
        )
    # Globbing starts at the last folder without a wildcard.
    root = epath.Path(*parts[: magic[0]])
    matches = sorted(map(os.fspath, root.glob("/".join(parts[magic[0] :]))))
    if not matches:
        raise UserError(f"{pattern}: matches no file")
    return matches


def open_all(paths: Sequence[str]) -> list[Shard]:
    """Inspect every shard; UserError if one cannot be read or is listed twice."""
    with ThreadPoolExecutor(OPENERS) as threads:
        # In parallel: of 10^5 shards each is opened once, at a request or a seek.
        looked_at = list(threads.map(inspect, paths))
    require_once("shard", paths, [shard.file for shard in looked_at])
    return renumbered(looked_at, range(len(looked_at)))


def require_once(noun: str, paths: Sequence[str], identities: Sequence[Any]) -> None:
    """UserError if two of the paths have one identity; see `file_of`."""
    path_of_file = {}
    for path, file in zip(paths, identities):
        if (other := path_of_file.setdefault(file, path)) != path:
            raise UserError(f"{path}: the same {noun} is listed twice, also as {other}")
    # A path that stands there twice is no second spelling, which the loop looks for.
    if len(path_of_file) < len(paths):
        twice, _ = Counter(paths).most_common(1)[0]
        raise UserError(f"{twice}: the same {noun} is listed twice")


def renumbered(shards: Sequence[Shard], places: Sequence[int]) -> list[Shard]:
    """The shards in the order of `places`, with consecutive numbers of records."""
    ordered, start = [], 0
    for place in places:
        ordered.append(shards[place]._replace(start=start))
        start += shards[place].count
    return ordered


def display_names(shards: Sequence[Shard]) -> list[str]:
    """Shards' file names, for messages; the whole path where two share a name."""
    names = [os.path.basename(shard.path) for shard in shards]
    counts = Counter(names)
    return [
        shard.path if counts[name] > 1 else name for name, shard in zip(names, shards)
    ]


def inspect(path: str) -> Shard:
    """Read a shard's size and count of records; UserError if it is none or empty."""
    try:
        if epath.Path(path).is_dir():
            raise UserError(f"{path}: is a folder, expected a shard, or a glob of them")
        size = files.size(path)
    except OSError as error:
        reason = error.strerror or "no such file"
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not size:
        raise UserError(f"{path}: has 0 bytes, expected a shard of records")
    reader = open_shard(path)
    count, options = reader.num_records(), reader.writer_options_string() or ""
    reader.close()
    if not count:
        raise UserError(f"{path}: holds 0 records")
    if "group_size:1," not in options:
        log.warning(
            "%s: slow to read, because it was not written with group_size:1", path
        )
    return Shard(path, file_of(path), size, count)


def open_shard(path: str) -> ArrayRecordReader | RangeReader:
    """Open a shard for reading; UserError if it is none, or not whole."""
    if files.remote(path):
        try:
            return RangeReader(path)
        except RuntimeError as error:
            raise _no_shard(path, error) from None
    # Records are read one at a time, in random order: reading ahead would be in vain.
    options = "readahead_buffer_size:0,max_parallelism:0"
    reader = ArrayRecordReader(path, options, file_reader_buffer_size=2**15)
    # ArrayRecord opens any file, and reports 0 records of one that it cannot read; the
    # reason comes out when it is closed.
    if not reader.ok():
        reason = "its index is missing"
        try:
            reader.close()
        except RuntimeError as error:
            reason = str(error)
        raise _no_shard(path, reason)
    return reader


def _no_shard(path: str, reason: object) -> UserError:
    return UserError(
        f"{path}: not a shard of records, or truncated or damaged: {reason}"
    )


def _temporary_file():
    """A file in TMPDIR; on Linux without a name, so that a kill leaves nothing."""
    linux = sys.platform == "linux"
    return (tempfile.TemporaryFile if linux else tempfile.NamedTemporaryFile)()


def _path_of(file) -> str:
    """A path to an open file, which may have no name, for another library to open."""
    named = isinstance(file.name, str)
    return file.name if named else f"/proc/self/fd/{file.fileno()}"


def file_of(path: str) -> Any:
    """The identity of a file, equal for two names of it."""
    if "://" in path:
        return path
    status = os.stat(path)
    if status.st_ino:  # some file systems have none
        return status.st_dev, status.st_ino
    return os.path.realpath(path)
