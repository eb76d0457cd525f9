"""Disk space of precomputed records, by their shapes and the number of input files."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

UNITS = ("PB", 10**15), ("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)


def tensor_bytes(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Bytes of a record's tensors, from the shape and dtype of each."""
    size = lambda shape, dtype: math.prod(shape) * np.dtype(dtype).itemsize
    return sum(size(*tensor) for tensor in tensors.values())


def lines(sizes: Sequence[int], counts: Sequence[int | None]) -> Iterator[str]:
    """The lines that precompute prints before it reads the first picture.

    `sizes` are the bytes of a record's tensors in each bucket. `counts` are the files
    of each part, or None for a tar, whose files are known only once it is read.
    """
    low, high = min(sizes), max(sizes)
    span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    yield f"tensors of a record: {span} bytes; caption and names come on top"
    # Which bucket a picture falls to is not known before it is read, nor whether it is
    # rejected: the largest bucket bounds the sum.
    files = sum(count for count in counts if count is not None)
    if files:
        yield f"listed: {files:,} files, at most {_rounded(files * high)} of tensors"
    if uncounted := sum(count is None for count in counts):
        yield f"not listed: {uncounted:,} parts, whose files are counted when read"


def _rounded(size: int) -> str:
    for unit, scale in UNITS:
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} bytes"
