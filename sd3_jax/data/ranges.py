"""Reading a shard in a bucket by ranges; ArrayRecord's reader opens local files only.

The format is Riegeli's (google/riegeli, doc/riegeli_records_file_format.md), with
ArrayRecord's index at the end. `shards.Writer` puts each record in a chunk of its own,
uncompressed, so that a record is one range. Other shards are refused.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sd3_jax import files
from sd3_jax.data import record_header

BLOCK = 2**16  # bytes; each block of a file begins with a header
BLOCK_HEADER = 24
CHUNK_HEADER = 40  # hash, size, hash of the data, type and number of records, decoded
MAGIC = 0x71930E704FDAE05E  # of the postscript
TAIL = 2**18  # bytes of the first request: the postscript, and the index of most shards
INDEX = 2**28  # bytes of an index, at most
VARINT = 10  # bytes, at most


class RangeReader:
    """The part of ArrayRecordReader's interface that is used, at one request a record.

    Damage is a RuntimeError, as in ArrayRecord. Threads may share a reader.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            self._options, self._ends = _index(path, files.size(path))
        # Protocol buffers of a damaged index parse to fields of wrong types.
        except (TypeError, ValueError, AttributeError, OverflowError):
            raise RuntimeError("its index is damaged") from None

    def num_records(self) -> int:
        return len(self._ends) - 1

    def writer_options_string(self) -> str:
        return self._options

    def read(self, indices: Sequence[int]) -> list[bytes]:
        return [self._record(index) for index in indices]

    def close(self) -> None:
        pass

    def _record(self, index: int) -> bytes:
        if not 0 <= index < self.num_records():
            raise RuntimeError(f"no record {index}, of {self.num_records()}")
        start, end = (int(x) for x in self._ends[index : index + 2])
        # A record, and 24 bytes for each 64 KiB of it: the factor of 2 is ample.
        if end - start > 2 * record_header.RECORD:
            raise RuntimeError(f"Corrupted: a record of {end - start} bytes")
        data = files.read_range(self.path, start, end)
        record, *others = _chunk(_without_headers(data, start))
        if others:
            raise RuntimeError("Corrupted: a chunk of more than one record")
        return record


def _index(path: str, size: int) -> tuple[str, np.ndarray]:
    """The writer's options, and the offsets of records, with the end of the last."""
    last = size - BLOCK  # the block of the postscript
    if last < BLOCK or size % BLOCK:
        raise RuntimeError(f"{size} bytes are not a whole number of blocks")
    # --- the postscript, in a block of its own, says where the index begins
    start = max(0, size - TAIL) // BLOCK * BLOCK
    tail = files.read_range(path, start, size)
    postscript = dict(_fields(_chunk(_without_headers(tail[last - start :], last))[0]))
    footer = postscript.get(1, 0)
    if postscript.get(2) != MAGIC or not BLOCK_HEADER < footer < last:
        raise RuntimeError("its index is missing")
    if last - footer > INDEX:
        raise RuntimeError(f"an index of more than {INDEX} bytes")
    if footer < start:
        tail, start = files.read_range(path, footer, last), footer

    # --- the index: a chunk of options and one entry for each chunk of records
    chunk = _without_headers(tail[footer - start : last - start], footer)
    options_entry, *entries = _chunk(chunk)
    options_entry = dict(_fields(dict(_fields(options_entry)).get(1, b"")))
    options = options_entry.get(4, b"").decode(errors="replace")
    entries = [dict(_fields(entry)) for entry in entries]
    if any(entry.get(3) != 1 for entry in entries):
        raise RuntimeError(
            f"written with {options}, several records a chunk; in a bucket only"
            " group_size:1 can be read: copy it to a file system"
        )
    # An entry has its chunk's offset; the index itself follows the last chunk.
    ends = [entry.get(1, 0) for entry in entries] + [footer]
    if any(a >= b for a, b in zip([0, *ends], ends)):
        raise RuntimeError("its index is damaged")
    return options, np.array(ends, np.int64)  # 8 bytes a record


def _without_headers(data: bytes, start: int) -> bytes:
    """Bytes that lie at `start` of a file, without the headers of blocks in them."""
    parts, at = [], 0
    while at < len(data):
        # Blocks of 64 KiB cut through chunks wherever they fall, each with a header.
        inside = (start + at) % BLOCK
        skip = max(0, BLOCK_HEADER - inside)
        parts.append(data[at + skip : at + BLOCK - inside])
        at += BLOCK - inside
    return b"".join(parts)


def _chunk(data: bytes) -> list[bytes]:
    """The records, one at least, of a simple chunk without compression."""
    size, count = _integer(data, 8), _integer(data, 25, 7)
    body = data[CHUNK_HEADER : CHUNK_HEADER + size]
    if len(data) < CHUNK_HEADER or len(body) < size:
        raise RuntimeError(f"Corrupted: a chunk of {size} bytes is cut off")
    if data[24] != ord("r") or not body:
        raise RuntimeError("Corrupted: no chunk of records where its index has one")
    if body[0]:
        raise RuntimeError(
            "a compressed chunk, which cannot be read in a bucket: copy it to a file"
            " system"
        )
    # A simple chunk: compression type, length of the sizes, sizes, records.
    sizes_size, at = _varint(body, 1)
    first, sizes = at + sizes_size, []
    while at < first:
        length, at = _varint(body, at)
        sizes.append(length)
    if not sizes or len(sizes) != count or first + sum(sizes) != size or at != first:
        raise RuntimeError("Corrupted: the sizes of records do not match their chunk")
    ends = np.cumsum([first, *sizes]).tolist()
    return [body[a:b] for a, b in zip(ends, ends[1:])]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer's integers and byte strings."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key % 8 == 2:  # `value` is a length
            value, at = data[at : at + value], at + value
        elif key % 8:
            raise RuntimeError("its index is damaged")
        yield key // 8, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 varint at `at`, lowest bits first, and where the next value begins."""
    value = 0
    for place, byte in enumerate(data[at : at + VARINT]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise RuntimeError("Corrupted: an integer without an end")


def _integer(data: bytes, at: int, size: int = 8) -> int:
    return int.from_bytes(data[at : at + size], "little")
