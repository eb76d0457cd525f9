"""Records as a training set: example number → record, in a reproducible order."""

import bisect
import contextlib
import functools
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from sd3_jax import files
from sd3_jax.data import records, shards
from sd3_jax.data.buckets import Turns
from sd3_jax.data.mixtures import Bucket, Set, check_weights, matching_bucket, order
from sd3_jax.data.ranges import RangeReader
from sd3_jax.data.records import BadRecord, Record
from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
OPEN = 256  # local shards at a time: 1,024 open files is a common limit
# Shards in buckets whose readers are kept. They hold no open file but the shard's
# index, 8 bytes a record, which costs a request or two to read again.
INDEXED = 2**14


class Records:
    """The examples of shards. Example i is a pure function of the seed and i.

    `paths` are files or globs. Without `weights` they are one set, and each epoch is a
    permutation of it. With `weights` each path is a set with epochs of its own, and its
    share holds over any short run of examples; grain keeps weights to one percent of
    the least.

    `shapes` gives the shapes of a record's tensors for each bucket, by a name such as
    "512x768". Without it there is one bucket, with the shapes of the first record. A
    shard belongs to the bucket that its name ends with, else to that of its first
    record. All `batch_size` examples of a step are of one bucket; each bucket's turn
    comes as often as it has records.

    `bad_records` is the largest share of all records that may be bad. The next good
    record of the same set replaces a bad one, so that the replacement depends only on
    the shards. Each process counts the bad records that it has met itself.

    UserError if paths, weights or shards are wrong; BadRecord if a record is.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        weights: Sequence[float | int] = (),
        shapes: dict[str, dict[str, tuple[int, ...]]] | None = None,
        batch_size: int = 1,
        bad_records: float = 0.0,
        seed: int = 0,
    ):
        check_weights(weights, paths)
        self.seed, self.batch_size = seed, batch_size
        self.weights, self.bad_records = tuple(weights), bad_records
        self.encoders: dict[str, str] = {}  # fingerprints by part, if they are known
        # Loader threads read concurrently; the count of bad records is shared.
        self._bad, self._lock = set(), threading.Lock()
        reader_limit = INDEXED if all(map(files.remote, paths)) else OPEN
        # The cache is this object's: one on the method would keep every Records alive.
        self._reader = functools.lru_cache(reader_limit)(self._open)

        # --- open every shard; number its records by set, then bucket
        matches = [shards.expand(path) for path in paths]
        if not matches:
            raise UserError("no paths: expected shards of records, or globs of them")
        self.shards = shards.open_all([path for group in matches for path in group])
        groups = [place for place, group in enumerate(matches) for _ in group]
        groups = groups if weights else [0] * len(groups)
        keys = list(zip(groups, self._shard_buckets(shapes)))
        places_by_key = sorted(range(len(keys)), key=keys.__getitem__)
        if places_by_key != list(range(len(keys))):
            # Shards of one set and bucket must follow each other: the numbers of its
            # records are then a range, which grain shuffles without a table. Readers
            # that were opened to find buckets are cached under the old places.
            self._reader.cache_clear()
            self.shards = shards.renumbered(self.shards, places_by_key)
            keys.sort()

        # --- group them into sets and buckets
        self._starts = [shard.start for shard in self.shards]
        self.sets = self._sets(paths, keys)
        self.buckets = self._buckets(shapes, keys)
        self._turns = Turns([sum(s.weight for s in b.sets) for b in self.buckets], seed)
        # Every row of a batch asks for the same step's turn.
        self._turn = functools.lru_cache(64)(self._turns.place)
        self._names = shards.display_names(self.shards)

        # --- take dtypes, and shapes where none are given, from the first record
        self.first = self._read_good(self.buckets[0].sets[0].numbers[0], self._record)
        if shapes is None:
            first_shapes = {name: x.shape for name, x in self.first.tensors.items()}
            self.buckets = [self.buckets[0]._replace(shapes=first_shapes)]
        self.fields = tuple(self.first.tensors)

    def __len__(self) -> int:
        return self.shards[-1].start + self.shards[-1].count

    def select_fields(self, fields: Sequence[str]) -> None:
        """Choose what batches have: tensors of the first record, "caption", and "set",
        the number of the path that an example is from."""
        self.fields = tuple(fields)

    def example(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each selected tensor of one of the bucket's examples."""
        tensors = self.first.tensors
        return {
            name: (bucket.shapes[name], tensors[name].dtype)
            for name in self.fields
            if name in tensors
        }

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Stack the tensors of these examples, all of one step, in the first record's
        dtypes."""
        bucket = self.buckets[self._turn(int(indices[0]) // self.batch_size)[0]]
        layout = self.example(bucket)
        batch = {
            name: np.empty((len(indices), *shape), dtype)
            for name, (shape, dtype) in layout.items()
        }
        captions, sets, read = [], [], functools.partial(self._read_fitting, layout)
        for row, i in enumerate(indices):
            number = self._number(int(i))
            record = self._read_good(number, read)
            captions.append(record.caption)
            sets.append(self._set_number(number))
            for name, x in batch.items():
                x[row] = record.tensors[name]
        # The prior of DreamBooth is weighed by the set that an example is from.
        batch |= {"set": np.array(sets, np.int32)} if "set" in self.fields else {}
        return batch | ({"caption": captions} if "caption" in self.fields else {})

    def names(self, indices: np.ndarray) -> list[str]:
        """Name the records of these examples: "train-00000.arecord:123".

        A bad record goes by its own name here, not by that of its replacement.
        """
        places = [self._place(self._number(int(i))) for i in indices]
        return [f"{self._names[shard]}:{index}" for shard, index in places]

    def identity(self) -> dict[str, Any]:
        """A flat, short summary of the data, for a checkpoint to compare on resume.

        It has a hash of the shards' names, sizes and counts, not of their contents,
        and no folders: a set that was moved is the same set.
        """
        listed = [(os.path.basename(s.path), s.bytes, s.count) for s in self.shards]
        return {
            "name": "records",
            "seed": self.seed,
            "weights": list(self.weights),
            "shards": len(listed),
            "records": len(self),
            "bytes": sum(shard.bytes for shard in self.shards),
            "listing": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16],
        }

    def _shard_buckets(self, shapes) -> list[int]:
        """The number of each shard's bucket."""
        if shapes is None or len(shapes) == 1:
            return [0] * len(self.shards)
        find = functools.partial(self._shard_bucket, shapes)
        with ThreadPoolExecutor(shards.OPENERS) as threads:
            return list(threads.map(find, range(len(self.shards))))

    def _shard_bucket(self, shapes: dict[str, dict], place: int) -> int:
        names, path = list(shapes), self.shards[place].path
        # precompute names the bucket; only other shards cost a read here.
        stem = os.path.basename(path).removesuffix(".arecord")
        if stem.rpartition("-")[2] in names:
            return names.index(stem.rpartition("-")[2])
        # A bad first record says nothing about the others of its shard.
        for index in range(self.shards[place].count):
            with contextlib.suppress(BadRecord):
                tensors = self._read(place, index).tensors
                break
        else:
            raise BadRecord(
                f"{path}: all of its records are bad; sd3-jax inspect names the fault"
                " of each"
            )
        return matching_bucket(tensors, shapes, path)

    def _sets(self, paths, keys) -> list[Set]:
        if not self.weights:
            return [Set(", ".join(paths), range(len(self)), 1)]
        groups = [group for group, _ in keys]
        return [
            Set(path, self._numbers(groups, group), weight)
            for group, (path, weight) in enumerate(zip(paths, self.weights))
        ]

    def _buckets(self, shapes, keys) -> list[Bucket]:
        """The buckets that have records, each with its part of every set.

        A set's weight is divided among buckets in proportion to its records there.
        """
        names = list(shapes) if shapes else [""]
        buckets = []
        for kind in sorted({kind for _, kind in keys}):
            parts = []
            for group, full_set in enumerate(self.sets):
                if (group, kind) in keys:
                    numbers = self._numbers(keys, (group, kind))
                    weight = full_set.weight * len(numbers) / len(full_set.numbers)
                    parts.append(Set(full_set.name, numbers, weight))
            known_shapes = shapes[names[kind]] if shapes else {}
            example_order = order(parts, self.seed)
            buckets.append(Bucket(names[kind], known_shapes, parts, example_order))
        return buckets

    def _numbers(self, keys: list, key) -> range:
        """Numbers of the records in shards with this key, which are contiguous."""
        # Keys are sorted, so equal ones are neighbours.
        first, last = keys.index(key), len(keys) - 1 - keys[::-1].index(key)
        last = self.shards[last]
        return range(self.shards[first].start, last.start + last.count)

    def _number(self, i: int) -> int:
        """The number of example i's record."""
        step, row = divmod(i, self.batch_size)
        bucket, earlier_steps = self._turn(step)
        return self.buckets[bucket].order[earlier_steps * self.batch_size + row]

    def _set_number(self, number: int) -> int:
        return next(i for i, one in enumerate(self.sets) if number in one.numbers)

    def _place(self, number: int) -> tuple[int, int]:
        """The number of a record's shard, and the record's index in it."""
        shard = bisect.bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _read_good(self, number: int, read: Callable[[int], Any]) -> Any:
        """Read a record, or if it is bad the next good one of its set and bucket."""
        sets = (s for bucket in self.buckets for s in bucket.sets)
        (numbers,) = (s.numbers for s in sets if number in s.numbers)
        for step in range(len(numbers)):
            candidate = numbers[(number - numbers.start + step) % len(numbers)]
            try:
                return read(candidate)
            except BadRecord as error:
                self._count_bad(candidate, error)
        raise BadRecord(f"{self._where(number)}: all records of its set are bad")

    def _count_bad(self, number: int, error: BadRecord) -> None:
        """Count a bad record; raise its error if more are bad than are allowed."""
        with self._lock:
            new = number not in self._bad  # each epoch meets the same ones again
            self._bad.add(number)
            count = len(self._bad)
        share = f"bad_records = {self.bad_records:g} of {len(self)}"
        if count > self.bad_records * len(self):
            if not self.bad_records:
                raise error
            raise BadRecord(f"{error}; {count} bad records exceed config.data.{share}")
        if new:
            log.warning("%s; using the next good record; %d of %s", error, count, share)

    def _read_fitting(self, layout: dict, number: int) -> Record:
        """The record, if a batch of these shapes and dtypes can hold it."""
        record = self._record(number)
        records.check_layout(record, layout, self._where(number))
        return record

    def _record(self, number: int) -> Record:
        return self._read(*self._place(number))

    def _read(self, shard: int, index: int) -> Record:
        where = f"{self.shards[shard].path}:{index}"
        try:
            (data,) = self._reader(shard).read([index])
        except RuntimeError as error:
            if str(error).startswith("Corrupted"):
                raise BadRecord(f"{where}: {error}") from None
            # A disk or network fault, not a bad record: another host may well have
            # read it, and would then go on with other examples than this one.
            raise UserError(f"{where}: cannot be read: {error}") from None
        return records.decode(data, where)

    def _where(self, number: int) -> str:
        shard, index = self._place(number)
        return f"{self.shards[shard].path}:{index}"

    def _open(self, place: int) -> ArrayRecordReader | RangeReader:
        shard = self.shards[place]
        reader = shards.open_shard(shard.path)
        # Readers are opened anew during a run, when the cache has dropped them.
        if reader.num_records() != shard.count:
            count = (
                f"{reader.num_records()} records, but {shard.count} when the run began"
            )
            raise UserError(
                f"{shard.path} changed during the run: it has {count}; restore it or"
                " start the run again"
            )
        return reader
