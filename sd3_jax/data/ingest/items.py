"""Items of the input: a picture with its columns, or the reason why it is rejected."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from numbers import Real
from typing import NamedTuple

from etils import epath
from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import files
from sd3_jax.data import images
from sd3_jax.data.ingest import listing
from sd3_jax.data.prompt_text import REFUSED
from sd3_jax.data.record_header import SOURCE
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json, shown

PICTURES = ("jpg", "jpeg", "png", "webp")  # extensions, in lower case
SIDECARS = ("json", "caption", "txt")  # captions of a later one override an earlier's
SIDECAR = 2**20  # bytes of one, at most, and of a line of metadata.jsonl
TEXT = 2**16  # characters of a column's text, values of its list; the rest is cut
Value = str | int | float | bool | None | list | dict


# OneTrainer keeps masks beside pictures: a-masklabel.png of a.jpg.
LABELS = ("-masklabel", "-condlabel")  # at the end of a stem
LABEL = "a mask or condition of another picture (OneTrainer's -masklabel, -condlabel)"


class BadItem(UserError):
    """The reason why an item is rejected. Where it lies, the caller knows."""


class Numeral(float):
    """A number of a CSV file that keeps its text, in case it turns out a caption."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        number.text = str(text)
        return number


class Item(NamedTuple):
    source: str  # an address for people and records: at most 1024 characters
    columns: dict[str, Value]  # what came with it: captions, scores
    read: Callable[[], bytes]  # the picture's file, or a BadItem; it can be pickled
    bytes: int  # of the picture's file, about
    time: int = 0  # in ns, when a picture in a folder was last written


class Rejected(NamedTuple):
    source: str
    reason: str  # what many have in common; what one alone has follows ": "
    bytes: int = 0


class Part(NamedTuple):
    """The unit of work that one host does. It survives a round trip through JSON."""

    kind: str  # "folder", "tar" or "parquet"
    path: str  # of the input: a file, or a folder
    label: str  # prefix of its sources, unlike that of any other input
    spans: list[list]  # [directory, first, number] of a folder's files;
    # of a parquet file's row groups ["", first, number]; none is the whole of it
    count: int | None  # items and rejected ones, if known without opening
    bytes: int  # its share of the whole
    listing: str  # a hash of the names and sizes that it was planned from
    stamp: str = ""  # a hash of all that and of the files' times


def whole_file(kind: str, path: str, label: str) -> Part:
    """A part that is one whole tar or parquet file."""
    # The time is in the stamp alone: a file that was only touched is still the planned
    # one, and is read again to see that.
    _, size, time = listing.look(path)
    name_and_size = listing.digest(epath.Path(path).name, size)
    stamp = listing.digest(name_and_size, time)
    return Part(kind, path, label, [], None, size, name_and_size, stamp)


def checked_item(
    source: str, columns: dict, read: Callable, size: int, time: int = 0
) -> Item | Rejected:
    """The item, or a Rejected if a record cannot hold its source or it is too large."""
    if REFUSED.search(source) or not source.strip() or len(source) > SOURCE:
        return rejected(source, "an odd name", size)
    if size > images.BYTES:
        return rejected(source, f"more than {images.BYTES} bytes", size)
    return Item(source, columns, read, size, time)


def rejected(source: str, reason: object, size: int = 0) -> Rejected:
    """A Rejected whose source and reason are made printable, whatever they hold."""
    return Rejected(shown(source, SOURCE), shown(reason, 300), max(0, size))


def read_at(path: str, start: int = 0, size: int | None = None) -> bytes:
    """Read `size` bytes of a file, or a whole picture; or a BadItem."""
    try:
        if not files.remote(path):
            with epath.Path(path).open("rb") as file:
                file.seek(start)
                # One byte more than is allowed shows that there are too many.
                data = file.read(images.BYTES + 1 if size is None else size)
        elif size is None:  # `checked_item` has seen that it is not too large
            data = files.read_whole(path)
        else:  # by epath 5 MB would be read for each picture of a tar
            data = files.read_range(path, start, start + size)
    except (OSError, ValueError, UserError) as error:
        raise BadItem(f"cannot be read: {why(error)}") from None
    if len(data) > images.BYTES:
        raise BadItem(f"more than {images.BYTES} bytes")
    if size is not None and len(data) < size:
        raise BadItem(
            f"cannot be read: {size} bytes, of which {len(data)} could be read"
        )
    return data


def read_columns(
    path: str, extension: str, start: int = 0, size: int | None = None
) -> dict[str, Value]:
    """The columns in a .txt, .caption or .json beside a picture; or a BadItem."""
    try:
        limit = SIDECAR + 1 if size is None else min(size, SIDECAR + 1)
        if size is not None and files.remote(path):  # of a tar
            data = files.read_range(path, start, start + limit)
        else:
            with epath.Path(path).open("rb") as file:
                file.seek(start)
                data = file.read(limit)
        if len(data) > SIDECAR:
            raise BadItem(f"its .{extension} is too large, more than {SIDECAR} bytes")
        text = data.decode(encoding_of(data))
        return columns(text) if extension == "json" else {"caption": _lines(text)}
    except BadItem:
        raise
    except (OSError, ValueError, UserError) as error:
        # A bucket that does not answer ends the job; otherwise its pictures would be
        # rejected for good.
        files.require_answered(path, error)
        raise BadItem(f"its .{extension} cannot be read: {why(error)}") from None


def _lines(text: str) -> str | list[str]:
    """The caption of a text file, or its captions, one a line, as in OneTrainer."""
    lines = [line for line in text[:TEXT].splitlines() if line.strip()]
    return lines if len(lines) > 1 else text[:TEXT]


def encoding_of(start: bytes) -> str:
    """The encoding of a text by its first bytes: UTF-16 has a mark, UTF-8 may have."""
    return "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def merge(columns: dict[str, Value], over: Mapping[str, Value]) -> dict[str, Value]:
    """Columns overridden by `over`, except where that is empty."""
    overriding = {k: v for k, v in over.items() if k not in columns or not empty(v)}
    return columns | overriding


def empty(value: Value) -> bool:
    """Whether a value is null, white space, or a list of such values."""
    if isinstance(value, list):
        return all(map(empty, value))
    return value is None or isinstance(value, str) and not value.strip()


def columns(text: str) -> dict[str, Value]:
    """Parse a JSON object, long texts cut and NaN as null; ValueError if it is none."""
    columns = parse_json(text, null_nonfinite=True)
    if not isinstance(columns, dict):
        raise ValueError("no object")
    return {k: v[:TEXT] if isinstance(v, str) else v for k, v in columns.items()}


def plain(value) -> Value:
    """A value of parquet as a value of JSON: dates as text, NaN as null, no bytes.

    Long texts and lists are cut. Recursive, and so not for JSON, which may nest deeper.
    """
    if isinstance(value, str):
        return value[:TEXT]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        fields = {str(k): v for k, v in value.items() if not isinstance(v, bytes)}
        return {k: plain(v) for k, v in fields.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value[:TEXT] if not isinstance(v, bytes)]
    if isinstance(value, (Real, Decimal)):  # numpy's float16, too
        return float(value) if math.isfinite(value) else None
    return str(value)[:TEXT]


def uniform(seed: int, source: str, *, purpose: bytes, count: int) -> list[float]:
    """`count` independent numbers in [0, 1), the same in every run and on every host.

    They go by source, not by place in the input: an item keeps its draws when others
    are added or filtered.
    """
    # `person` keeps draws for one purpose apart from those for another.
    data = json.dumps([seed, source]).encode()  # ASCII, whatever the source is
    digest = hashlib.blake2b(data, digest_size=8 * count, person=purpose).digest()
    words = (digest[i : i + 8] for i in range(0, 8 * count, 8))
    return [(int.from_bytes(word) >> 11) / 2**53 for word in words]  # a float's 53 bits


def call_function(
    function: Callable,
    name: str,
    picture: UInt8[ndarray, "h w 3"] | None,
    columns: Mapping[str, Value],
):
    """Call a user's function with a read-only picture; its exception is a BadItem."""
    # Not a copy: the record is made of the same array, which must stay as it is.
    if picture is not None:
        picture = picture.view()
        picture.flags.writeable = False
    try:
        return function(picture, dict(columns))
    except MemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise BadItem(f"{name} failed: {shown(failure, 200)}") from error


def why(error: Exception) -> str:
    """A short reason why something cannot be read, without its path."""
    if isinstance(error, UserError):  # of `files`, which names the path as well
        error = error.__cause__ or error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return shown(reason, 120)
