"""Values of parquet columns: their lengths before they are decoded, then the values.

pyarrow is imported in functions: importing it takes longer than a small job.
"""

from itertools import accumulate

from sd3_jax.data.ingest.captions import STANDING, USUAL
from sd3_jax.data.ingest.items import SIDECAR, TEXT, BadItem, Value, plain
from sd3_jax.foreign_text import shown

CAPTIONS = {*STANDING, *USUAL}
BYTES = ("binary", "large_binary", "binary_view")  # types


def text_lengths(column) -> list[int]:
    """Bytes of all the texts in each row, counted without decoding them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if not _holds_text(kind):
        return [0] * len(column)
    if pa.types.is_dictionary(kind):
        # Each distinct text is measured once, however many rows have it.
        lengths = pc.binary_length(column.dictionary).take(column.indices)
    elif _is_text(kind):
        lengths = pc.binary_length(column)
    elif pa.types.is_struct(kind):
        fields = [text_lengths(field) for field in column.flatten()]
        return [sum(row_lengths) for row_lengths in zip(*fields)]
    else:
        # A list: the sum over its elements. flatten() leaves out what null lists hide,
        # unlike .values, so that counts of null are 0 as well.
        sums = [0, *accumulate(text_lengths(column.flatten()))]
        counts = pc.fill_null(pc.list_value_length(column), 0).to_pylist()
        ends = accumulate(counts)
        return [sums[end] - sums[end - count] for end, count in zip(ends, counts)]
    return pc.fill_null(lengths, 0).to_pylist()


def column_value(name: str, column, i: int, length: int, as_bytes: bool) -> Value:
    """A row's value; BadItem for a caption that is not UTF-8, and for any long text.

    Other bytes that are long or not UTF-8 are None.
    """
    named = name.lower() in CAPTIONS
    if length > SIDECAR:
        if as_bytes and not named:
            return None
        raise BadItem(f"its {shown(name)} is too large, more than {SIDECAR} bytes")
    value = _decoded(scalar(column, i))
    if named and value is None and column[i].is_valid:
        raise BadItem(f"its {shown(name)} cannot be read: not UTF-8")
    return plain(value)


def scalar(column, i: int):
    """One value as a Python object, times as text; None if it cannot be converted."""
    import pyarrow as pa

    value = column.slice(i, 1)
    # A duration as text is a bare number in pyarrow; as_py gives a timedelta.
    try:
        if pa.types.is_temporal(column.type) and not pa.types.is_duration(column.type):
            value = value.cast(pa.string())  # to the nanosecond, unlike Python's own
        if pa.types.is_list(column.type) and value[0].is_valid:
            return value[0].values[:TEXT].to_pylist()  # no more than is kept
        return value[0].as_py()
    except (ValueError, ArithmeticError, LookupError, NotImplementedError):
        return None


def _decoded(value):
    """Bytes as UTF-8 text, None where they are not; other values as they are."""
    if isinstance(value, list):
        texts = map(_decoded, value)
        return [text for text, x in zip(texts, value) if text is not None or x is None]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None


def _holds_text(kind) -> bool:
    """Whether a type holds texts; those of maps are not counted."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(_holds_text(field.type) for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_text(kind.value_type)
    return _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_text(kind) -> bool:
    return str(kind) in (*BYTES, "string", "large_string", "string_view")
