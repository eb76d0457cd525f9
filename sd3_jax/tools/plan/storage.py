"""What records of n pictures take: disk, shards, batches and hours, before any is read.

Invented pictures stand for the ones that are not there yet. docs/data.md has the
arithmetic beside the paper's (Table 7).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sd3_jax.data.record_header import FORMAT, VERSION
from sd3_jax.tools.plan import synthetic_web

SAMPLE = 10**6  # invented pictures, at most; counts of more are scaled from these
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}  # as a file has them
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "uint8": "U8"}
CLIP_LENGTH = 77  # tokens, of pooled's channels
FRAME = 56  # bytes that a shard adds to each record
PAGE = 2**16  # bytes a shard is padded to, 24 of which are the page's own
INDEX = 8  # bytes of it a record, at a shard's end
TABLE_7 = {"vae": 2.45, "clip_l": 0.45, "clip_g": 2.77, "t5": 17.46}  # ms on an A100
AT = {"pixels": 256**2, "tokens": 77}  # to which these times belong
STEP_S = 0.5  # seconds of a training step, for the rate of reading


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


def plan(
    n: int,
    *,
    buckets: Sequence[tuple[int, int]],
    latents: str = "moments",
    latents_dtype: str = "float16",
    channels: int = 16,
    factor: int = 8,
    text_tokens: int = 154,
    context_dim: int = 4096,
    pooled_dim: int = 2048,
    text_dtype: str = "bfloat16",
    part: int = 10_000,
    batch_size: int = 4096,
    caption: int = 100,
    source: int = 40,
    images_per_second: float | None = None,
    chips: int = 1,
    step_seconds: float = STEP_S,
    sample: int = SAMPLE,
    seed: int = 0,
) -> Storage:
    """Records of n invented pictures, cut to these buckets (height, width in pixels).

    `latents` are "moments", a "sample" of them, or "image", the pixels; no text_tokens:
    no text but the caption. Each `part` pictures leave a shard a bucket that has any.
    `caption` and `source` are bytes. Without `images_per_second` a chip's is that of
    the paper's A100, by Table 7 and in proportion to pixels and tokens.
    """
    looked = min(n, sample)
    counts, larger, kept = _count(looked, buckets, seed)
    pictures = _scaled(counts, n)
    what = dict(latents=latents, latents_dtype=latents_dtype, channels=channels)
    what |= dict(text_tokens=text_tokens, context_dim=context_dim)
    what |= dict(factor=factor, pooled_dim=pooled_dim, text_dtype=text_dtype)
    about = _about(caption, source)
    shapes, tensors = [], {}
    for i, (height, width) in enumerate(buckets):
        held = arrays(height, width, **what)
        for name, (dtype, shape) in held.items():
            of = tensors.setdefault(name, {"dtype": dtype, "bytes": []})
            of["bytes"].append(math.prod(shape) * BYTES[dtype])
        size = record_bytes(held, about)
        files = _files(pictures[i], n, part)
        each = pictures[i] / max(files, 1)
        row = Shape(
            height=height,
            width=width,
            pictures=pictures[i],
            record_bytes=size,
            shards=files,
            shard_bytes=shard_bytes(round(each), size) if files else 0,
            batches=pictures[i] // batch_size,
            enlarged=float(larger[i] / max(counts[i], 1)),
            kept=float(kept[i] / max(counts[i], 1)),
        )
        shapes.append(row)
    total = sum(row.shards * row.shard_bytes for row in shapes)
    mean = sum(x.pictures * x.record_bytes for x in shapes) / max(n, 1)
    area = sum(x.pictures * x.height * x.width for x in shapes) / max(n, 1)
    epoch = sum(row.batches for row in shapes)
    rate, rate_from = images_per_second, "as given"
    if rate is None:
        rate = table_7_rate(area, text_tokens, encoded=latents != "image")
        rate_from = "by the paper's Table 7, on an A100"
    return Storage(
        pictures=n,
        sample=looked,
        tensors=tensors,
        shapes=[row._asdict() for row in shapes],
        bytes=total,
        shards=sum(row.shards for row in shapes),
        record_bytes=mean,
        batch_size=batch_size,
        epoch=epoch,
        left_over=1 - epoch * batch_size / max(n, 1),
        enlarged=float(larger.sum() / max(looked, 1)),
        kept=float(kept.sum() / max(looked, 1)),
        reading=batch_size * mean / step_seconds,
        step_seconds=step_seconds,
        images_per_second=rate if math.isfinite(rate) else None,
        chips=chips,
        hours=hours(n, images_per_second=rate, chips=chips),
        rate_from=rate_from,
    )


def arrays(
    height: int,
    width: int,
    *,
    latents: str,
    latents_dtype: str,
    channels: int,
    factor: int,
    text_tokens: int,
    context_dim: int,
    pooled_dim: int,
    text_dtype: str,
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A record's tensors: dtype and shape."""
    h, w = height // factor, width // factor
    pictures = {
        "moments": ("moments", latents_dtype, (h, w, 2 * channels)),
        "sample": ("latents", latents_dtype, (h, w, channels)),
        "image": ("image", "uint8", (height, width, 3)),
    }
    if latents not in pictures:
        raise ValueError(f'latents "{latents}": wanted one of {", ".join(pictures)}')
    name, dtype, shape = pictures[latents]
    held = {name: (dtype, shape)}
    if text_tokens:
        held["clip"] = (text_dtype, (CLIP_LENGTH, pooled_dim))
        if text_tokens > CLIP_LENGTH:
            held["t5"] = (text_dtype, (text_tokens - CLIP_LENGTH, context_dim))
        held["pooled"] = (text_dtype, (pooled_dim,))
    return held


def record_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> int:
    """Of data.records.encode, exactly: a safetensors blob with this metadata."""
    header, start = {"__metadata__": dict(metadata)}, 0
    for name in sorted(tensors, key=lambda k: (list(BYTES).index(tensors[k][0]), k)):
        dtype, shape = tensors[name]
        end = start + math.prod(shape) * BYTES[dtype]
        entry = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        header[name], start = entry, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + start


def shard_bytes(records: int, record_bytes: int) -> int:
    """Of a file of so many records: padded to whole pages, and its index behind."""
    framed = records * (record_bytes + FRAME)
    return PAGE * (math.ceil(framed / (PAGE - 24)) + math.ceil(records * INDEX / PAGE))


def hours(n: int, *, images_per_second: float, chips: int = 1) -> float:
    """Of precompute; `images_per_second` is a chip's."""
    return n / (images_per_second * chips) / 3600


def table_7_rate(pixels: float, tokens: int, *, encoded: bool = True) -> float:
    """Images a second of the paper's A100; times go with pixels and T5's tokens."""
    ms = TABLE_7["vae"] * pixels / AT["pixels"] if encoded else 0.0
    if tokens:
        t5 = max(0, tokens - CLIP_LENGTH)  # CLIP's come first, its two's side by side
        ms += TABLE_7["clip_l"] + TABLE_7["clip_g"] + TABLE_7["t5"] * t5 / AT["tokens"]
    return 1e3 / ms if ms else math.inf


def _count(n, buckets, seed):
    """By bucket: pictures, those enlarged, and the sum of the shares kept."""
    sums = np.zeros((3, len(buckets)))
    for block, _ in synthetic_web.blocks(n, seed):
        of, larger, kept = synthetic_web.fits(block, buckets)
        for row, weights in enumerate((None, larger > 1, kept)):
            sums[row] += np.bincount(of, weights, minlength=len(buckets))
    return sums


def _scaled(counts: np.ndarray, n: int) -> list[int]:
    """Counts in the same proportion that add up to n, by largest remainders."""
    looked = int(counts.sum())
    if not looked:
        return [0] * len(counts)
    exact = [int(count) * n for count in counts]  # over `looked`, in whole numbers
    made = [x // looked for x in exact]
    order = sorted(range(len(counts)), key=lambda i: -(exact[i] % looked))
    for i in order[: n - sum(made)]:
        made[i] += 1
    return made


def _files(pictures: int, n: int, part: int) -> int:
    """Shards of a bucket: parts in which it has any picture, on average."""
    if not pictures:
        return 0
    parts = math.ceil(n / part)
    some = -math.expm1(part * math.log1p(-pictures / n)) if pictures < n else 1.0
    return max(1, min(pictures, round(parts * some)))


def _about(caption: int, source: int) -> dict[str, str]:
    """Metadata as data.records writes it, of a caption and a source so long."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "source": "s" * source,
        "caption": "c" * caption,
        "caption_from": "synthetic",
        "size": "[1000, 1000]",
        "crop": "[100, 100, 1000, 1000]",
        "checksum": f"crc32:{8 * '0'}",
    }


HEAD = "bucket pictures share MB/record shards MB/shard batches enlarged kept".split()


def _lines(x: Storage) -> Iterator[str]:
    scaled = f", scaled from {x.sample:,}" if x.sample < x.pictures else ""
    yield f"{x.pictures:,} invented pictures{scaled}"
    yield ""
    cells = [HEAD]
    for row in map(lambda given: Shape(**given), x.shapes):
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
