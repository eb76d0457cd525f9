"""Counting what shards of records hold, in memory that does not grow with them."""

import collections
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from sd3_jax.data import record_header, records, shards
from sd3_jax.data.records import BadRecord, Record
from sd3_jax.distributed import watchdog
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

LISTED = 50  # bad records and shards that are listed one by one
KINDS = 30  # reasons, sources of captions and the like that are counted apart
BUCKETS = 128  # of which there are pictures to choose from
THREADS = 4  # shards read at a time
FACTOR = 8  # pixels along a latent's side
WAIT = 7 * 86_400.0  # seconds for a shard, which may be large and all be read


@dataclass
class Tally:
    """Counts of a shard, or of several. Its size is bounded, however much is bad."""

    name: str
    shards: int = 0
    records: int = 0  # as the files say
    bytes: int = 0
    good: int = 0  # of those that were read
    captions: int = 0  # of the good ones
    bad_count: int = 0  # records and shards
    holds: Counter = field(default_factory=Counter)
    buckets: Counter = field(default_factory=Counter)  # of all records, by those read
    bucket_bytes: Counter = field(default_factory=Counter)
    made_by: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)  # the first of them

    def saw(self, record: Record) -> None:
        """Count a good record."""
        self.good += 1
        self.captions += bool(record.caption)
        _count(self.holds, held(record))
        if record.caption:
            _count(self.made_by, record.caption_from or "unknown")

    def fault(self, error: UserError, reason: str) -> None:
        self.bad_count += 1
        _count(self.reasons, reason)
        if len(self.bad) < LISTED:
            self.bad.append(shown(error, 400))

    def add(self, other: "Tally") -> None:
        for name in ("shards", "records", "bytes", "good", "captions", "bad_count"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("holds", "buckets", "bucket_bytes", "made_by", "reasons"):
            for key, n in getattr(other, name).items():
                _count(getattr(self, name), key, n)
        self.bad += other.bad[: LISTED - len(self.bad)]

    def bucket(self) -> str:
        """The most common bucket, by which shards are folded into rows."""
        return max(self.buckets, key=self.buckets.get, default="unknown")


class Choice:
    """Chooses records for the contact sheet, as many of every bucket."""

    # A reservoir for each bucket: every record read is as likely, in one pass, however
    # many will come.
    def __init__(self, pictures: int):
        self.pictures, self._kept, self._seen = pictures, {}, Counter()
        self._rng = np.random.default_rng(0)

    def offer(self, path: str, index: int, bucket: str) -> None:
        # Foreign records may have any number of shapes: memory is for BUCKETS of them.
        if bucket not in self._kept and len(self._kept) == BUCKETS:
            return
        self._seen[bucket] += 1
        kept = self._kept.setdefault(bucket, [])
        if len(kept) < self.pictures:
            kept.append((path, index))
        elif (place := self._rng.integers(self._seen[bucket])) < self.pictures:
            kept[place] = (path, index)

    def chosen(self) -> list[tuple[str, int]]:
        """At most `pictures` records, taken from buckets in turn, sorted by bucket."""
        names = sorted(self._kept, key=sides)
        turns = [[(name, x) for x in self._kept[name]] for name in names]
        rounds = itertools.chain(*itertools.zip_longest(*turns))
        picked = list(itertools.islice(filter(None, rounds), self.pictures))
        return [x for bucket_name in names for name, x in picked if name == bucket_name]


def tallies(
    paths: list[str], limit: int, choice: Choice
) -> Iterator[tuple[str, Tally]]:
    """Yield shards' tallies in order, reading a few ahead."""
    with ThreadPoolExecutor(THREADS) as threads:
        remaining = iter(paths)
        submit = lambda path: (path, threads.submit(look, path, limit))
        ahead = collections.deque(map(submit, itertools.islice(remaining, 2 * THREADS)))
        while ahead:
            path, future = ahead.popleft()
            watchdog.expect(f"the records of {name_of(path)}", WAIT)
            tally, good_records = future.result()
            ahead.extend(map(submit, itertools.islice(remaining, 1)))
            for index, bucket_name in good_records:
                choice.offer(path, index, bucket_name)
            yield path, tally


def look(path: str, limit: int) -> tuple[Tally, list[tuple[int, str]]]:
    """Read `limit` evenly spread records of a shard (0: all); its tally, and the index
    and bucket of each good record."""
    tally, good_records = Tally(name_of(path), shards=1), []
    try:
        shard = shards.inspect(path)
        reader = shards.open_shard(path)
    except UserError as error:
        tally.fault(error, "not readable")
        return tally, good_records
    tally.records, tally.bytes = shard.count, shard.bytes
    try:
        for index in spread(shard.count, limit):
            try:
                record, _ = read(reader, path, index)
            except UserError as error:
                tally.fault(error, reason(error, f"{path}:{index}: "))
                continue
            tally.saw(record)
            good_records.append((index, bucket(record)))
    finally:
        reader.close()
    # The shares of the records that were read stand for the whole shard.
    for name, n in Counter(name for _, name in good_records).items():
        tally.buckets[name] = tally.records * n / len(good_records)
        tally.bucket_bytes[name] = tally.bytes * n / len(good_records)
    return tally, good_records


def read(reader, path: str, index: int) -> tuple[Record, int]:
    """Read a record and its size in bytes; or a UserError."""
    where = f"{path}:{index}"
    try:
        # ArrayRecord reports damage as RuntimeError; the next record may be good.
        (data,) = reader.read([index])
    except RuntimeError as error:
        raise BadRecord(f"{where}: unreadable: {error}") from None
    return records.decode(data, where), len(data)


def spread(count: int, limit: int) -> Iterable[int]:
    """`limit` evenly spread indices, the first and the last among them."""
    if not 0 < limit < count:
        return range(count)
    return np.linspace(0, count - 1, limit).round().astype(int).tolist()


def reason(error: UserError, where: str) -> str:
    """The kind of an error in a few words: "checksum", "not a record", "latents"."""
    match = re.match(r"[\w ]{1,24}(?=:| )", str(error).removeprefix(where))
    return match[0] if match else "damaged"


def held(record: Record) -> str:
    """A record's tensors: "moments 64x64x32 F16, context 154x4096 BF16"."""
    return ", ".join(
        f"{name} {'x'.join(map(str, x.shape))} {record_header.NAMES[x.dtype]}"
        for name in record_header.TENSORS
        if (x := record.tensors.get(name)) is not None
    )


def bucket(record: Record) -> str:
    """A record's height x width in pixels, of its image or of what its latents show."""
    if "image" in record.tensors:
        height, width, _ = record.tensors["image"].shape
        return f"{height}x{width}"
    name = "moments" if "moments" in record.tensors else "latents"
    height, width, _ = record.tensors[name].shape
    return f"{FACTOR * height}x{FACTOR * width}"


def sides(name: str) -> tuple[float, str]:
    """A sort key for buckets: tall ones first."""
    match = re.fullmatch(r"(\d+)x(\d+)", name)
    return (int(match[2]) / int(match[1]) if match else np.inf, name)


def name_of(path: str) -> str:
    return shown(os.path.basename(path), 120)


def _count(counter: Counter, key: str, n: float = 1) -> None:
    """Count a key, of at most KINDS different ones; the rest is "other"."""
    # Foreign files may hold any number of different texts.
    counter[key if key in counter or len(counter) < KINDS else "other"] += n
