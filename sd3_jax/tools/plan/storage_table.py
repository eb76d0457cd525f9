"""A plan of storage as data and as text."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A bucket's part of the plan. `pictures` are how many fall to it."""

    height: int
    width: int
    pictures: int
    record_bytes: int
    shards: int
    shard_bytes: int  # of a shard of middling size
    batches: int  # whole ones an epoch
    enlarged: float  # share of its pictures whose pixels are fewer than the bucket's
    kept: float  # of a picture by the crop, on average


class Storage(NamedTuple):
    """A plan of n records; `text` is for people, `_asdict` for JSON."""

    pictures: int
    sample: int  # invented pictures that the counts are scaled from
    tensors: dict[str, dict[str, Any]]  # dtype, and bytes by bucket, a record
    shapes: list[dict[str, Any]]  # of Shape's fields
    bytes: int  # on disk
    shards: int
    record_bytes: float  # on average
    batch_size: int
    epoch: int  # batches, of all buckets
    left_over: float  # share of the pictures that fill no batch of their bucket
    enlarged: float
    kept: float
    reading: float  # bytes a second, all hosts together, at a step of `step_seconds`
    step_seconds: float
    images_per_second: float | None  # a chip, in precompute; None if it encodes nothing
    chips: int
    hours: float
    rate_from: str

    def text(self) -> str:
        return "\n".join(_lines(self))


HEAD = "bucket pictures share MB/record shards MB/shard batches enlarged kept".split()


def _lines(x: Storage) -> Iterator[str]:
    scaled = f", scaled from {x.sample:,}" if x.sample < x.pictures else ""
    yield f"{x.pictures:,} invented pictures{scaled}"
    yield ""
    cells = [HEAD]
    for row in map(lambda fields: Shape(**fields), x.shapes):
        cells.append(
            [
                f"{row.height}x{row.width}",
                f"{row.pictures:,}",
                f"{row.pictures / max(x.pictures, 1):.1%}",
                f"{row.record_bytes / 1e6:.3f}",
                f"{row.shards:,}",
                f"{row.shard_bytes / 1e6:,.1f}",
                f"{row.batches:,}",
                f"{row.enlarged:.0%}",
                f"{row.kept:.0%}",
            ]
        )
    wide = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        yield "  ".join(f"{cell:>{n}}" for cell, n in zip(row, wide))
    yield ""
    yield "a record: " + ", ".join(
        f"{name} {_span(of['bytes'])} kB {of['dtype']}"
        for name, of in x.tensors.items()
    )
    yield (
        f"on disk: {_large(x.bytes)} in {x.shards:,} shards,"
        f" {x.record_bytes / 1e6:.3f} MB a record"
    )
    yield (
        f"an epoch: {x.epoch:,} batches of {x.batch_size:,}, each of one bucket;"
        f" {x.left_over:.2%} of the pictures fill none"
    )
    yield (
        f"pictures: {x.enlarged:.0%} are smaller than their bucket; the crop keeps"
        f" {x.kept:.0%} of one"
    )
    yield (
        f"reading: {_large(x.reading)}/s, all hosts together, at"
        f" {x.step_seconds:g} s a step"
    )
    if x.images_per_second is None:
        yield "precompute: encodes nothing; its hours are the hosts', which resize"
        return
    chips = f"{x.chips:,} chip" + "s" * (x.chips != 1)
    yield (
        f"precompute: {x.hours:,.1f} hours on {chips} at {x.images_per_second:,.1f}"
        f" images/s each ({x.rate_from})"
    )


def _span(sizes: Sequence[int]) -> str:
    low, high = (f"{f(sizes) / 1e3:,.1f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def _large(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 1e3:,.2f} kB"
