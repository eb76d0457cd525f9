"""What a run draws from: sets of shards, their epochs shuffled, mixed by weights."""

import bisect
import collections
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from sd3_jax import files
from sd3_jax.data import records, shards
from sd3_jax.data.buckets import Turns
from sd3_jax.data.ranges import RangeReader
from sd3_jax.data.records import BadRecord, Record
from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
OPEN = 256  # shards at a time: a process may have 1,024 files
INDEXED = 2**14  # shards in buckets whose indices, 8 bytes a record, are in memory
SPREAD = 1e6  # of weights, from the least to the greatest


class Set(NamedTuple):
    """What has epochs of its own, and how often it is drawn from beside the others."""

    name: str
    numbers: range  # of its records
    weight: float


class Bucket(NamedTuple):
    """Records of one shape: batches are of one bucket."""

    name: str
    shapes: dict[str, tuple[int, ...]]  # that their tensors may have
    sets: list[Set]
    order: grain.MapDataset  # of its records' numbers


class Records:
    """The examples of shards; example i is a pure function of the seed and i.

    `paths` are files or globs. Without `weights` they are one set, each epoch of which
    is a permutation of its own. With them every path is a set with such epochs, and its
    share of the examples holds over any few of them; grain keeps weights to one percent
    of the least.

    `shapes` are what each record's tensors must have, by bucket, "512x768"; one bucket
    with those of the first record unless given. A shard is of one bucket: the one that
    its name ends with, else its first record's. All `batch_size` examples of a step are
    of one bucket, whose turn comes as often as it has records.

    `bad_records` is the largest share of all records that may be bad: the next good
    record of the set takes a bad one's place, which depends on nothing but the shards.
    Each process counts the bad ones that itself has met since it started.

    A UserError says in one line what is wrong with paths, weights or shards; one that
    is a BadRecord, what is wrong with a record.
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
        self.seed, self.weights, self.bad_records = seed, tuple(weights), bad_records
        self.batch_size = batch_size
        self.encoders: dict[str, str] = {}  # fingerprints by part, if they are known
        self._bad, self._lock = set(), threading.Lock()
        reader_limit = INDEXED if all(map(files.remote, paths)) else OPEN
        self._reader = functools.lru_cache(reader_limit)(self._open)
        matches = [shards.expand(path) for path in paths]
        if not matches:
            raise UserError("no paths: wanted shards of records, or globs of them")
        self.shards = shards.open_all([path for group in matches for path in group])
        groups = [place for place, group in enumerate(matches) for _ in group]
        groups = groups if weights else [0] * len(groups)
        keys = list(zip(groups, self._shard_buckets(shapes)))
        places_by_key = sorted(range(len(keys)), key=keys.__getitem__)
        if places_by_key != list(range(len(keys))):
            # Shards of one set and bucket follow each other, so that its records'
            # numbers are a range, which grain shuffles without a table.
            self._reader.cache_clear()
            self.shards = shards.renumbered(self.shards, places_by_key)
            keys.sort()
        self._starts = [shard.start for shard in self.shards]
        self.sets = self._sets(paths, keys)
        self.buckets = self._buckets(shapes, keys)
        self._turns = Turns([sum(s.weight for s in b.sets) for b in self.buckets], seed)
        self._turn = functools.lru_cache(64)(self._turns.place)
        names = [os.path.basename(shard.path) for shard in self.shards]
        counts = collections.Counter(names)
        self._names = [
            shard.path if counts[name] > 1 else name
            for name, shard in zip(names, self.shards)
        ]
        self.first = self._read_good(self.buckets[0].sets[0].numbers[0], self._record)
        if shapes is None:
            first_shapes = {name: x.shape for name, x in self.first.tensors.items()}
            self.buckets = [self.buckets[0]._replace(shapes=first_shapes)]
        self.fields = tuple(self.first.tensors)

    def __len__(self) -> int:
        return self.shards[-1].start + self.shards[-1].count

    def keep(self, fields: Sequence[str]) -> None:
        """Of what the first record holds, what batches are to have; and "caption", and
        "set": which of the paths an example is of, by its place among them."""
        self.fields = tuple(fields)

    def example(self, bucket: Bucket) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of each tensor of one of its examples."""
        tensors = self.first.tensors
        return {
            name: (bucket.shapes[name], tensors[name].dtype)
            for name in self.fields
            if name in tensors
        }

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """The tensors of these examples of one step, stacked, in the first's dtypes."""
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
        batch |= {"set": np.array(sets, np.int32)} if "set" in self.fields else {}
        return batch | ({"caption": captions} if "caption" in self.fields else {})

    def names(self, indices: np.ndarray) -> list[str]:
        """The records that these examples are, "train-00000.arecord:123".

        A bad record that another takes the place of has its own name here.
        """
        places = [self._place(self._number(int(i))) for i in indices]
        return [f"{self._names[shard]}:{index}" for shard, index in places]

    def identity(self) -> dict[str, Any]:
        """What data this is, flat and short: the shards' names, sizes and counts."""
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
        """Of each shard, its bucket by its place among them."""
        if shapes is None or len(shapes) == 1:
            return [0] * len(self.shards)
        find = functools.partial(
            self._shard_bucket, list(shapes), list(shapes.values())
        )
        with ThreadPoolExecutor(shards.OPENERS) as threads:
            return list(threads.map(find, range(len(self.shards))))

    def _shard_bucket(self, names: list[str], shapes: list[dict], place: int) -> int:
        path = self.shards[place].path
        stem = os.path.basename(path).removesuffix(".arecord")
        if stem.rpartition("-")[2] in names:
            return names.index(stem.rpartition("-")[2])
        for index in range(self.shards[place].count):
            with contextlib.suppress(BadRecord):
                tensors = self._read(place, index).tensors
                break
        else:
            raise BadRecord(f"{path}: none of its records is good")
        for kind, expected in enumerate(shapes):
            if all(x.shape == expected.get(name) for name, x in tensors.items()):
                return kind
        listed = ", ".join(f"{name} {x.shape}" for name, x in tensors.items())
        raise UserError(f"{path}: {listed} is of no bucket: wanted {', '.join(names)}")

    def _sets(self, paths, keys) -> list[Set]:
        if not self.weights:
            return [Set(", ".join(paths), range(len(self)), 1)]
        groups = [group for group, _ in keys]
        return [
            Set(path, self._numbers(groups, group), weight)
            for group, (path, weight) in enumerate(zip(paths, self.weights))
        ]

    def _buckets(self, shapes, keys) -> list[Bucket]:
        """Those that have records, each with its part of every set that has some."""
        names = list(shapes) if shapes else [""]
        buckets = []
        for kind in sorted({kind for _, kind in keys}):
            parts = []
            for group, whole in enumerate(self.sets):
                if (group, kind) in keys:
                    numbers = self._numbers(keys, (group, kind))
                    weight = whole.weight * len(numbers) / len(whole.numbers)
                    parts.append(Set(whole.name, numbers, weight))
            known_shapes = shapes[names[kind]] if shapes else {}
            example_order = order(parts, self.seed)
            buckets.append(Bucket(names[kind], known_shapes, parts, example_order))
        return buckets

    def _numbers(self, keys: list, key) -> range:
        """Of the records in shards with this key, which follow each other."""
        first, last = keys.index(key), len(keys) - 1 - keys[::-1].index(key)
        last = self.shards[last]
        return range(self.shards[first].start, last.start + last.count)

    def _number(self, i: int) -> int:
        """The record that example i is."""
        step, row = divmod(i, self.batch_size)
        bucket, before = self._turn(step)
        return self.buckets[bucket].order[before * self.batch_size + row]

    def _set_number(self, number: int) -> int:
        return next(i for i, one in enumerate(self.sets) if number in one.numbers)

    def _place(self, number: int) -> tuple[int, int]:
        """A record's shard, by its place among them, and its index in it."""
        shard = bisect.bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _read_good(self, number: int, read: Callable[[int], Any]) -> Any:
        """What `read` makes of the record, or of the next good one of its set."""
        sets = (s for bucket in self.buckets for s in bucket.sets)
        (numbers,) = (s.numbers for s in sets if number in s.numbers)
        for step in range(len(numbers)):
            candidate = numbers[(number - numbers.start + step) % len(numbers)]
            try:
                return read(candidate)
            except BadRecord as error:
                self._count_bad(candidate, error)
        raise BadRecord(f"{self._where(number)}: no record of its set is good")

    def _count_bad(self, number: int, error: BadRecord) -> None:
        """Put a bad record down; raise its error if that is one more than may be."""
        with self._lock:
            new = number not in self._bad
            self._bad.add(number)
            count = len(self._bad)
        share = f"bad_records = {self.bad_records:g} of {len(self)}"
        if count > self.bad_records * len(self):
            if not self.bad_records:
                raise error
            raise BadRecord(f"{error}; {count} bad records are more than {share}")
        if new:
            log.warning("%s; the next good one is read; %d of %s", error, count, share)

    def _read_fitting(self, layout: dict, number: int) -> Record:
        """The record, if a batch of these shapes and dtypes can hold it."""
        record, where = self._record(number), self._where(number)
        for name, (shape, dtype) in layout.items():
            if name not in record.tensors:
                raise BadRecord(f"{where}: {name}: missing, which the first record has")
            x = record.tensors[name]
            if x.shape != shape:
                raise BadRecord(f"{where}: {name}: shape {x.shape}, wanted {shape}")
            if not np.can_cast(x.dtype, dtype):
                raise BadRecord(
                    f"{where}: {name}: dtype {x.dtype}, the first record's is {dtype}"
                )
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
            # Of a disk or a network: another host may well have read it.
            raise UserError(f"{where}: cannot be read: {error}") from None
        return records.decode(data, where)

    def _where(self, number: int) -> str:
        shard, index = self._place(number)
        return f"{self.shards[shard].path}:{index}"

    def _open(self, place: int) -> ArrayRecordReader | RangeReader:
        shard = self.shards[place]
        reader = shards.open_shard(shard.path)
        if reader.num_records() != shard.count:
            count = f"{reader.num_records()} records, {shard.count} when the run began"
            raise UserError(f"{shard.path}: was changed: it has {count}")
        return reader


def order(sets: Sequence[Set], seed: int) -> grain.MapDataset:
    """The number of the record that example i is, for any i, by random access."""
    epochs = []
    for place, one in enumerate(sets):
        numbers = grain.MapDataset.range(one.numbers.start, one.numbers.stop)
        epochs.append(numbers.seed((seed + place) % 2**32).shuffle().repeat())
    if len(epochs) == 1:
        return epochs[0]
    return grain.MapDataset.mix(epochs, [one.weight for one in sets])


def check_weights(weights: Sequence[float | int], paths: Sequence[str]) -> None:
    """None, or a number > 0 for each path; else a UserError."""
    setting = f"weights = {tuple(weights)}"
    if weights and len(weights) != len(paths):
        raise UserError(
            f"{setting}: wanted none, or one for each of {len(paths)} paths"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{setting}: wanted finite numbers > 0; leave a path out for 0")
    if weights and max(weights) > SPREAD * min(weights):
        raise UserError(f"{setting}: wanted none over {SPREAD:g} times another")
