"""Parquet files with a picture in each row, as Hugging Face writes them, as a stream.

A file of a few kB may decode to many thousand times its size: a long text that stands
once in a dictionary, for all rows. Texts and pictures therefore stay in dictionaries
until their lengths are known, and the larger the rows the smaller the batches.

pyarrow is imported where it is needed: to import it takes longer than a small job.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.data import images
from sd3_jax.data.ingest.items import (
    SIDECAR,
    TEXT,
    BadItem,
    Item,
    Part,
    Rejected,
    checked_item,
    merge,
    rejected,
    whole_file,
    why,
)
from sd3_jax.data.ingest.parquet_values import (
    BYTES,
    CAPTIONS,
    column_value,
    scalar,
    text_lengths,
)
from sd3_jax.foreign_text import shown

log = logging.getLogger(__name__)
# Names of the column of pictures, best first: `image` is Hugging Face's, `jpg` that of
# img2dataset.
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
BATCH = 64  # rows, and their pictures, in memory at once, or fewer
BUDGET = 2**25  # bytes that a batch of several rows is decoded to, about
LARGE = 2**27  # bytes of a column in a row group; up to here any mean a row is fine
MASKS = 2**14  # bytes a row, beyond which a column of bytes holds no texts
BUFFER = 2**20  # bytes; without one pyarrow reads a row group's pictures at once


class Columns(NamedTuple):
    """The columns that are read of a file, by their names in it."""

    picture: str
    paths: list[str]  # of all columns, the picture's bytes first
    bytes: set[str]  # other columns of bytes: texts, where they are UTF-8


def plan(path: str, label: str, size: int) -> list[Part]:
    """Parts of whole row groups, up to `size` rows; one part if it cannot be read."""
    whole = whole_file("parquet", path, label)
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
        share = whole.bytes * rows // max(1, sum(groups))
        spans = [["", first, number]]
        parts.append(whole._replace(spans=spans, count=rows, bytes=share))
        first += number
    return parts or [whole]


def items(part: Part) -> Iterator[Item | Rejected]:
    """The items of a part, one a row; one Rejected for an unreadable row group."""
    try:
        with _opened(part.path) as file:
            yield from _rows(file, part)
    except BadItem as error:
        yield rejected(part.label, error, part.bytes)


def _rows(file, part: Part) -> Iterator[Item | Rejected]:
    spans = part.spans or [["", 0, file.metadata.num_row_groups]]
    groups = {i for _, first, number in spans for i in range(first, first + number)}
    columns = _columns(file.schema.to_arrow_schema())
    end = 0
    for group in _groups(file):
        row, end = end, end + file.metadata.row_group(group).num_rows
        if group not in groups:
            continue
        try:
            for picture, values in _read(file, part.path, group, columns):
                source = f"{part.label}:{row}"
                if isinstance(picture, BadItem):
                    yield rejected(source, picture)
                else:
                    yield _outcome(source, picture, values)
                row += 1
        except BadItem as error:
            yield rejected(f"{part.label}:{row}-{end - 1}", error)


def _outcome(source: str, picture, columns: dict) -> Item | Rejected:
    picture = picture.get("bytes") if isinstance(picture, dict) else picture
    # A WebDataset that was converted keeps the sample's .json as one column.
    if isinstance(columns.get("json"), dict):
        columns = merge(columns.pop("json"), columns)
    if not picture:
        return rejected(source, "no picture in its row")
    return checked_item(source, columns, partial(bytes, picture), len(picture))


def _read(file, path: str, group: int, columns: Columns) -> Iterator[tuple]:
    """(picture, values by column) of each row of a group; a BadItem for the picture of
    a rejected row. Raises BadItem where the group cannot be decoded."""
    rows, paths = _bounded(file, group, columns)
    batches = file.iter_batches(rows, [group], paths, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except MemoryError:
            raise
        except Exception as error:  # damaged pages raise most things
            files.require_answered(path, error)
            raise BadItem(f"cannot be read: {why(error)}") from None
        if batch is None:
            return
        values = dict(zip(batch.schema.names, batch.columns))
        pictures = values.pop(columns.picture)
        sizes, lengths = (
            text_lengths(pictures),
            {k: text_lengths(x) for k, x in values.items()},
        )
        for i in range(batch.num_rows):
            if sizes[i] > images.BYTES:
                yield BadItem(f"more than {images.BYTES} bytes"), {}
                continue
            try:
                row = {
                    name: column_value(
                        name, column, i, lengths[name][i], name in columns.bytes
                    )
                    for name, column in values.items()
                }
            except BadItem as error:
                yield error, {}
            else:
                yield scalar(pictures, i), row


def _bounded(file, group: int, columns: Columns) -> tuple[int, list[str]]:
    """How many rows to decode at once, and which columns.

    A column of numbers whose rows are too large is left out and logged. BadItem if a
    text or the picture is too large.
    """
    row_group = file.metadata.row_group(group)
    rows, decoded, dropped = max(1, row_group.num_rows), 0, set()
    inside = lambda path, name: path == name or path.startswith(f"{name}.")
    for i in range(row_group.num_columns):
        chunk, leaf = row_group.column(i), file.schema.column(i)
        name = next((x for x in columns.paths if inside(leaf.path, x)), None)
        if name is None:
            continue
        text = leaf.physical_type == "BYTE_ARRAY"
        width = 4 if text else leaf.length if leaf.length > 0 else 8
        # A dictionary is stored once for many rows; `num_values` bounds what its
        # indices take.
        size = max(chunk.total_uncompressed_size, width * chunk.num_values)
        picture = inside(name, columns.picture)
        if name in columns.bytes and name.lower() not in CAPTIONS:
            if size > MASKS * rows:  # masks and the like: not decoded to be dropped
                dropped.add(name)
                continue
        size_limit = rows * (images.BYTES if picture else TEXT if text else SIDECAR)
        if size > LARGE and size > size_limit:
            size_text = f"{shown(leaf.path)} has {size} bytes in {rows} rows"
            if picture or text:
                raise BadItem(f"too large to decode: {size_text}")
            log.warning("skipped a column: a row group's %s", size_text)
            dropped.add(name)
        else:
            decoded += size
    return max(1, min(BATCH, BUDGET * rows // max(1, decoded))), [
        name for name in columns.paths if name not in dropped
    ]


@contextmanager
def _opened(path: str) -> Iterator:
    """Open a parquet file; BadItem if it is damaged or has no column of pictures."""
    import pyarrow.parquet as pq

    try:
        opened = epath.Path(path).open("rb")
    except OSError as error:
        files.require_answered(path, error)
        raise BadItem(f"cannot be read: {why(error)}") from None
    with opened as stream:
        try:
            # Opened twice: read_dictionary wants the names of columns, which only the
            # footer has. The second takes the footer from the first.
            file = pq.ParquetFile(stream, buffer_size=BUFFER)
            _columns(file.schema.to_arrow_schema())
            leaves = [file.schema.column(i) for i in range(len(file.schema))]
            texts = [x.path for x in leaves if x.physical_type == "BYTE_ARRAY"]
            options = dict(read_dictionary=texts, metadata=file.metadata)
            file = pq.ParquetFile(stream, buffer_size=BUFFER, **options)
        except (BadItem, MemoryError):
            raise
        except Exception as error:  # damaged footers raise most things
            files.require_answered(path, error)
            raise BadItem(f"cannot be read: {why(error)}") from None
        yield file


def _columns(schema) -> Columns:
    """Choose the column of pictures and the columns to read; or a BadItem."""
    import pyarrow as pa

    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise BadItem(
            f"the column {shown(twice[0])} appears twice: rename or remove one"
        )
    plain_kind = lambda kind: kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = {name: plain_kind(schema.field(name).type) for name in schema.names}

    def in_struct(kind) -> bool:
        inside = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        return inside and str(plain_kind(kind.field("bytes").type)) in BYTES

    in_bytes = {name for name, kind in kinds.items() if str(kind) in BYTES}
    pictures = in_bytes | {name for name, kind in kinds.items() if in_struct(kind)}
    images_ = [name for name in pictures if name.lower() in IMAGES]
    if not images_:
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise BadItem(
            "no column of pictures; expected one of bytes, or of a struct with bytes,"
            f" named {' or '.join(IMAGES[:3])}: rename it; its columns are"
            f" {shown(columns, 150)}"
        )
    # Several may be named as pictures: the best name, in lower case if both are there.
    picture = min(images_, key=lambda x: (IMAGES.index(x.lower()), x.lower() != x, x))
    path = picture if picture in in_bytes else f"{picture}.bytes"
    texts = in_bytes - set(images_)
    others = [name for name in kinds if name not in pictures or name in texts]
    return Columns(picture, [path, *others], texts)


def _groups(file) -> range:
    return range(file.metadata.num_row_groups)
