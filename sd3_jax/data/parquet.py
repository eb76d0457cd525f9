"""Parquet files with a picture a row, as Hugging Face writes them, read as a stream.

pyarrow is imported where it is needed: to import it takes longer than a small job.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from etils import epath

from sd3_jax.data import listing
from sd3_jax.data.items import (
    BadItem,
    Item,
    Part,
    Rejected,
    Value,
    plain,
    rejected,
    taken,
)
from sd3_jax.outside import shown

IMAGES = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
BYTES = ("binary", "large_binary", "binary_view")  # types
BATCH = 64  # rows, and their pictures, in memory at once
BUFFER = 2**20  # bytes; without it a row group's pictures would be read at once


def plan(path: str, label: str, size: int) -> list[Part]:
    """Row groups, put together up to `size` rows; the whole, if it cannot be read."""
    length, changed = listing.stat_of(path)
    known = listing.digest_file(path, length)
    stamp = listing.digest(known, changed)
    whole = Part("parquet", path, label, [], None, length, known, stamp)
    try:
        with _opened(path) as file:
            groups = [file.metadata.row_group(i).num_rows for i in _groups(file)]
    except BadItem:
        return [whole]
    parts, first = [], 0
    while first < len(groups):
        number, rows = 1, groups[first]
        while first + number < len(groups) and rows + groups[first + number] <= size:
            rows += groups[first + number]
            number += 1
        share = length * rows // max(1, sum(groups))
        spans = [["", first, number]]
        parts.append(whole._replace(spans=spans, count=rows, bytes=share))
        first += number
    return parts or [whole]


def items(part: Part) -> Iterator[Item | Rejected]:
    """A row each, and one for those of a row group that cannot be read."""
    try:
        with _opened(part.path) as file:
            yield from _rows(file, part)
    except BadItem as error:
        yield rejected(part.label, error, part.bytes)


def _rows(file, part: Part) -> Iterator[Item | Rejected]:
    spans = part.spans or [["", 0, file.metadata.num_row_groups]]
    groups = {i for _, first, number in spans for i in range(first, first + number)}
    column, wanted = _columns(file.schema_arrow)
    end = 0
    for group in _groups(file):
        row, end = end, end + file.metadata.row_group(group).num_rows
        if group not in groups:
            continue
        try:
            for picture, columns in _read(file, group, column, wanted):
                yield _outcome(f"{part.label}:{row}", picture, columns)
                row += 1
        except BadItem as error:
            yield rejected(f"{part.label}:{row}-{end - 1}", error)


def _outcome(source: str, picture, columns: dict) -> Item | Rejected:
    picture = picture.get("bytes") if isinstance(picture, dict) else picture
    if not picture:
        return rejected(source, "no picture in its row")
    return taken(source, columns, partial(bytes, picture), len(picture))


def _read(file, group: int, column: str, wanted: list[str]) -> Iterator[tuple]:
    """(picture, columns) of a row group's rows; a BadItem where it is damaged."""
    batches = file.iter_batches(BATCH, [group], wanted, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except MemoryError:
            raise
        except Exception as error:  # damaged pages raise most things
            raise BadItem(f"cannot be read: {_why(error)}") from None
        if batch is None:
            return
        values = dict(zip(batch.schema.names, batch.columns))
        pictures = values.pop(column)
        for i in range(batch.num_rows):
            columns = {name: _value(each, i) for name, each in values.items()}
            yield _scalar(pictures, i), columns


def _value(column, i: int) -> Value:
    value = plain(_scalar(column, i))
    return None if isinstance(value, bytes) else value


def _scalar(column, i: int):
    """One value as Python has it, a time as text; None if it cannot be had, as text
    that is not UTF-8."""
    import pyarrow as pa

    value = column.slice(i, 1)
    try:
        if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
            value = value.cast(pa.string())  # to the nanosecond, unlike Python's own
        return value[0].as_py()
    except (ValueError, ArithmeticError, LookupError, NotImplementedError):
        return None


@contextmanager
def _opened(path: str) -> Iterator:
    """The open file, with a column of pictures in it; else a BadItem."""
    import pyarrow.parquet as pq

    try:
        opened = epath.Path(path).open("rb")
    except OSError as error:
        raise BadItem(f"cannot be read: {_why(error)}") from None
    with opened as stream:
        try:
            file = pq.ParquetFile(stream, buffer_size=BUFFER)
            _columns(file.schema_arrow)
        except (BadItem, MemoryError):
            raise
        except Exception as error:  # so do damaged footers
            raise BadItem(f"cannot be read: {_why(error)}") from None
        yield file


def _columns(schema) -> tuple[str, list[str]]:
    """The column of pictures, and all that is read: no other bytes than those."""
    import pyarrow as pa

    def pictures(kind) -> bool:
        inside = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return str(kind.field("bytes").type if inside else kind) in BYTES

    kinds = dict(zip(schema.names, schema.types))
    found = [name for name in IMAGES if name in kinds and pictures(kinds[name])]
    if not found:
        raise BadItem(f"no column of bytes; wanted one of {', '.join(IMAGES)}")
    inside = f"{found[0]}.bytes" if pa.types.is_struct(kinds[found[0]]) else found[0]
    others = [name for name, kind in kinds.items() if not pictures(kind)]
    return found[0], [inside, *others]


def _groups(file) -> range:
    return range(file.metadata.num_row_groups)


def _why(error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(reason, 120)
