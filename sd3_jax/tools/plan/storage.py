"""The disk space, shards, batches and hours of n records, before any is read.

Synthetic picture sizes (synthetic_web.py) stand in for real ones. docs/data.md compares
the arithmetic with the paper's Table 7.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sd3_jax.data.record_header import FORMAT, VERSION
from sd3_jax.tools.plan import synthetic_web
from sd3_jax.tools.plan.storage_table import Shape, Storage

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
    # The shares of a million pictures are exact to about 0.1 %, so larger counts scale.
    looked = min(n, sample)
    sums = _count(looked, buckets, seed)
    options = dict(latents=latents, latents_dtype=latents_dtype, channels=channels)
    options |= dict(text_tokens=text_tokens, context_dim=context_dim)
    options |= dict(factor=factor, pooled_dim=pooled_dim, text_dtype=text_dtype)
    records = [arrays(height, width, **options) for height, width in buckets]
    about = _about(caption, source)
    sizes = [record_bytes(record, about) for record in records]
    shapes = _bucket_rows(n, buckets, sums, sizes, part, batch_size)
    area = sum(x.pictures * x.height * x.width for x in shapes) / max(n, 1)
    rate, rate_from = images_per_second, "as given"
    if rate is None:
        rate = table_7_rate(area, text_tokens, encoded=latents != "image")
        rate_from = "by the paper's Table 7, on an A100"
    return Storage(
        pictures=n,
        sample=looked,
        tensors=_tensor_bytes(records),
        shapes=[row._asdict() for row in shapes],
        **_totals(n, shapes, batch_size, step_seconds),
        enlarged=float(sums[1].sum() / max(looked, 1)),
        kept=float(sums[2].sum() / max(looked, 1)),
        **_hours(n, rate, chips),
        rate_from=rate_from,
    )


def _totals(
    n: int, shapes: Sequence[Shape], batch_size: int, step_seconds: float
) -> dict[str, float]:
    """Bytes, shards, batches and the rate of reading, over all buckets."""
    mean = sum(x.pictures * x.record_bytes for x in shapes) / max(n, 1)
    epoch = sum(row.batches for row in shapes)
    return dict(
        bytes=sum(row.shards * row.shard_bytes for row in shapes),
        shards=sum(row.shards for row in shapes),
        record_bytes=mean,
        batch_size=batch_size,
        epoch=epoch,
        left_over=1 - epoch * batch_size / max(n, 1),
        reading=batch_size * mean / step_seconds,
        step_seconds=step_seconds,
    )


def _hours(n: int, rate: float, chips: int) -> dict[str, Any]:
    return dict(
        # JSON has no infinity: a plan that encodes nothing has no rate.
        images_per_second=rate if math.isfinite(rate) else None,
        chips=chips,
        hours=hours(n, images_per_second=rate, chips=chips),
    )


def _bucket_rows(
    n: int,
    buckets: Sequence[tuple[int, int]],
    sums: np.ndarray,
    sizes: Sequence[int],
    part: int,
    batch_size: int,
) -> list[Shape]:
    """`sums` (3, buckets) are _count's, `sizes` the bytes of a record by bucket."""
    counts, larger, kept = sums
    rows = []
    for i, pictures in enumerate(_scaled(counts, n)):
        files = _files(pictures, n, part)
        per_shard = pictures / max(files, 1)
        row = Shape(
            *buckets[i],
            pictures=pictures,
            record_bytes=sizes[i],
            shards=files,
            shard_bytes=shard_bytes(round(per_shard), sizes[i]) if files else 0,
            batches=pictures // batch_size,
            enlarged=float(larger[i] / max(counts[i], 1)),
            kept=float(kept[i] / max(counts[i], 1)),
        )
        rows.append(row)
    return rows


def _tensor_bytes(records: Sequence[Mapping]) -> dict[str, dict[str, Any]]:
    """Each tensor's dtype, and its bytes in a record of each bucket."""
    tensors = {}
    for record in records:
        for name, (dtype, shape) in record.items():
            entry = tensors.setdefault(name, {"dtype": dtype, "bytes": []})
            entry["bytes"].append(math.prod(shape) * BYTES[dtype])
    return tensors


# --- bytes


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
    # safetensors writes tensors by dtype, the widest first, and then by name; the order
    # sets the digits of the offsets, and so the length of the header.
    for name in sorted(tensors, key=lambda k: (list(BYTES).index(tensors[k][0]), k)):
        dtype, shape = tensors[name]
        end = start + math.prod(shape) * BYTES[dtype]
        entry = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
        header[name], start = entry, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # 8 bytes of length, and a header padded to a multiple of 8.
    return 8 + 8 * math.ceil(len(text) / 8) + start


def shard_bytes(records: int, record_bytes: int) -> int:
    """Of a file of so many records: padded to whole pages, and its index behind."""
    framed = records * (record_bytes + FRAME)
    return PAGE * (math.ceil(framed / (PAGE - 24)) + math.ceil(records * INDEX / PAGE))


# --- hours


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


# --- counts


def _count(n, buckets, seed):
    """By bucket: pictures, enlarged ones, and the sum of the shares that crops keep."""
    sums = np.zeros((3, len(buckets)))
    for block in synthetic_web.blocks(n, seed):
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
    scaled = [x // looked for x in exact]
    order = sorted(range(len(counts)), key=lambda i: -(exact[i] % looked))
    for i in order[: n - sum(scaled)]:
        scaled[i] += 1
    return scaled


def _files(pictures: int, n: int, part: int) -> int:
    """Shards of a bucket: parts in which it has any picture, on average."""
    if not pictures:
        return 0
    # Each part of the input writes its own shard for every bucket that it meets.
    parts = math.ceil(n / part)
    # The chance that a part of `part` pictures has one of this bucket: 1 - (1 -
    # share)^part, in logarithms because shares may be tiny.
    filled = -math.expm1(part * math.log1p(-pictures / n)) if pictures < n else 1.0
    return max(1, min(pictures, round(parts * filled)))


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
