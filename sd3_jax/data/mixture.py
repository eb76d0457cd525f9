"""What a run draws from: sets of shards, their epochs shuffled, mixed by weights."""

import bisect
import collections
import functools
import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from sd3_jax.data import records, shards
from sd3_jax.data.records import BadRecord, Record
from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
OPEN = 256  # shards at a time: a process may have 1,024 files
SPREAD = 1e6  # of weights, from the least to the greatest


class Set(NamedTuple):
    """What has epochs of its own, and how often it is drawn from beside the others."""

    name: str
    numbers: range  # of its records
    weight: float


class Records:
    """The examples of shards; example i is a pure function of the seed and i.

    `paths` are files or globs. Without `weights` they are one set, each epoch of which
    is a permutation of its own. With them every path is a set with such epochs, and its
    share of the examples holds over any few of them; grain keeps weights to one percent
    of the least.

    `shapes` are what each record's tensors must have, those of the first record unless
    given. `bad_records` is the largest share of all records that may be bad: the next
    good record of the set takes a bad one's place, which depends on nothing but the
    shards. Each process counts the bad ones that itself has met since it started.

    A UserError says in one line what is wrong with paths, weights or shards; one that
    is a BadRecord, what is wrong with a record.
    """

    def __init__(
        self,
        paths: Sequence[str],
        *,
        weights: Sequence[float | int] = (),
        shapes: dict[str, tuple[int, ...]] | None = None,
        bad_records: float = 0.0,
        seed: int = 0,
    ):
        check_weights(weights, paths)
        self.seed, self.weights, self.bad_records = seed, tuple(weights), bad_records
        found = [shards.expand(path) for path in paths]
        if not found:
            raise UserError("no paths: wanted shards of records, or globs of them")
        self.shards = shards.open_all([path for group in found for path in group])
        self._starts = [shard.start for shard in self.shards]
        self._bad, self._lock = set(), threading.Lock()
        self._reader = functools.lru_cache(OPEN)(self._open)
        self.sets = self._sets(paths, [len(group) for group in found])
        self._order = order(self.sets, seed)
        names = [os.path.basename(shard.path) for shard in self.shards]
        twice = {name for name, n in collections.Counter(names).items() if n > 1}
        self._names = [
            shard.path if name in twice else name
            for name, shard in zip(names, self.shards)
        ]
        self.first = self._good(0, self._record)
        kinds = {name: x.shape for name, x in self.first.tensors.items()}
        self.shapes = kinds if shapes is None else shapes

    def __len__(self) -> int:
        return self.shards[-1].start + self.shards[-1].count

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of these examples, stacked, in float32."""
        batch = {
            name: np.empty((len(indices), *shape), np.float32)
            for name, shape in self.shapes.items()
        }
        for row, i in enumerate(indices):
            found = self._good(self._order[int(i)], self._tensors)
            for name, x in batch.items():
                x[row] = found[name]  # exactly: float32 holds both halves
        return batch

    def names(self, indices: np.ndarray) -> list[str]:
        """The records that these examples are, "train-00000.arecord:123".

        A bad record that another takes the place of has its own name here.
        """
        places = [self._place(self._order[int(i)]) for i in indices]
        return [f"{self._names[shard]}:{index}" for shard, index in places]

    def identity(self) -> dict[str, Any]:
        """What data this is, flat and short: the shards' names, sizes and counts."""
        files = [(os.path.basename(s.path), s.bytes, s.count) for s in self.shards]
        return {
            "name": "records",
            "seed": self.seed,
            "weights": list(self.weights),
            "shards": len(files),
            "records": len(self),
            "bytes": sum(shard.bytes for shard in self.shards),
            "listing": hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16],
        }

    def _sets(self, paths, counts) -> list[Set]:
        if not self.weights:
            return [Set(", ".join(paths), range(len(self)), 1)]
        made, rest = [], iter(self.shards)
        for path, count, weight in zip(paths, counts, self.weights):
            own = [next(rest) for _ in range(count)]
            numbers = range(own[0].start, own[-1].start + own[-1].count)
            made.append(Set(path, numbers, weight))
        return made

    def _place(self, number: int) -> tuple[int, int]:
        """A record's shard, by its place among them, and its index in it."""
        shard = bisect.bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _good(self, number: int, read: Callable[[int], Any]) -> Any:
        """What `read` makes of the record, or of the next good one of its set."""
        (own,) = (s.numbers for s in self.sets if number in s.numbers)
        for step in range(len(own)):
            at = own[(number - own.start + step) % len(own)]
            try:
                return read(at)
            except BadRecord as error:
                self._count(at, error)
        raise BadRecord(f"{self._where(number)}: no record of its set is good")

    def _count(self, number: int, error: BadRecord) -> None:
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

    def _tensors(self, number: int) -> dict[str, np.ndarray]:
        found = self._record(number).tensors
        for name, shape in self.shapes.items():
            if found[name].shape != shape:
                where, given = self._where(number), found[name].shape
                raise BadRecord(f"{where}: {name}: shape {given}, wanted {shape}")
        return found

    def _record(self, number: int) -> Record:
        shard, index = self._place(number)
        try:
            (data,) = self._reader(shard).read([index])
        except RuntimeError as error:
            if str(error).startswith("Corrupted"):
                raise BadRecord(f"{self._where(number)}: {error}") from None
            # Of a disk or a network: another host may well have read it.
            raise UserError(f"{self._where(number)}: cannot be read: {error}") from None
        return records.decode(data, self._where(number))

    def _where(self, number: int) -> str:
        shard, index = self._place(number)
        return f"{self.shards[shard].path}:{index}"

    def _open(self, place: int) -> ArrayRecordReader:
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
    given = f"weights = {tuple(weights)}"
    if weights and len(weights) != len(paths):
        raise UserError(f"{given}: wanted none, or one for each of {len(paths)} paths")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{given}: wanted finite numbers > 0; leave a path out for 0")
    if weights and max(weights) > SPREAD * min(weights):
        raise UserError(f"{given}: wanted none over {SPREAD:g} times another")
