"""A folder's metadata.jsonl or metadata.csv, as Hugging Face's imagefolder has it.

{"file_name": "sub/a.jpg", "text": "a red fox", "aesthetic": 5.1}
"""

import codecs
import csv
import io
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from etils import epath

from sd3_jax import files
from sd3_jax.data.ingest import items, listing
from sd3_jax.data.ingest.captions import STANDING, USUAL
from sd3_jax.data.ingest.items import SIDECAR, BadItem, Value
from sd3_jax.foreign_text import shown

NAMES = ("metadata.csv", "metadata.jsonl")  # the later one's words go over the other's
BLOCK = 2**20  # bytes that are read at once
PLAIN = re.compile(rb'"file_name"\s*:\s*"([^"\\]*)"')
SPELT = re.compile(rb"\\u00[56]")  # a letter of file_name that is spelt as its number
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
NULLS = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "inf", "-inf"}  # pandas'
DELIMITERS = ",\t;"
ROW = re.compile(r"[\r\n]\s*[^,;\t\r\n]+\.(jpe?g|png|webp)\"?[,;\t]", re.IGNORECASE)
FAULTS = (OSError, UnicodeError, csv.Error)  # of a whole file


class BadLine(BadItem):
    """A line that is not taken; `names` are those that it seems to be about."""

    def __init__(self, reason: str, names: tuple[str, ...] = ()):
        super().__init__(reason)
        self.names = names


def governing(root: str, directory: str) -> list[tuple[str, str, int]]:
    """(directory, name, bytes) of each metadata file that goes for it, outermost
    first."""
    parts = directory.split("/") if directory else []
    governing_files = []
    for depth in range(len(parts) + 1):
        place = "/".join(parts[:depth])
        for name in NAMES:
            path = listing.join(root, listing.join(place, name))
            kind, size = listing.look(path)
            if kind == listing.FILE:
                governing_files.append((place, name, size))
    return governing_files


def columns(
    root: str, directories: Collection[str], names: Collection[str]
) -> Callable[[str], dict[str, Value]]:
    """What is said of these pictures, by name; of the others nothing is kept.

    An inner folder's words go over an outer one's. A picture whose metadata cannot be
    read, the file or its line, is a BadItem: it is not taken for one without a caption.
    """
    governing_files = {
        row[:2] for directory in directories for row in governing(root, directory)
    }
    depth = lambda file: len(file[0].split("/")) if file[0] else 0
    columns_of, bad_lines, bad_files = {}, {}, {}
    for place, name in sorted(governing_files, key=lambda file: (depth(file), file)):
        first_columns = {}  # by picture; the first line about it counts
        try:
            for _, line in _lines(root, place, name, names):
                if isinstance(line, BadLine):
                    for picture in set(line.names) & set(names):
                        bad_lines.setdefault(picture, f"its line in {name}: {line}")
                elif picture := _picture(root, line[0], names):
                    first_columns.setdefault(picture, line[1])
        except FAULTS as error:
            files.require_answered(root, error)
            bad_files[place, name] = getattr(error, "strerror", None) or error
        for picture, line_columns in first_columns.items():
            columns_of[picture] = items.merge(columns_of.get(picture, {}), line_columns)

    def columns_for(picture: str) -> dict[str, Value]:
        for (place, name), reason in bad_files.items():
            if not place or picture.startswith(f"{place}/"):
                raise BadItem(f"its {name} cannot be read: {shown(reason, 200)}")
        if picture in bad_lines and picture not in columns_of:
            raise BadItem(bad_lines[picture])
        return columns_of.get(picture, {})

    return columns_for


def faults(root: str, directory: str, name: str) -> Iterator[tuple[int, str]]:
    """(line, why) of lines that are not taken; line 0 if the file cannot be read."""
    first_lines, bad_lines, tree = {}, [], _Tree(root)
    try:
        for number, line in _lines(root, directory, name):
            if isinstance(line, BadLine):
                bad_lines.append((number, str(line)))
                continue
            picture = next(filter(tree.holds, line[0]), None)
            if (picture or line[0][0]) in first_lines:
                bad_lines.append((number, "a file_name that came before"))
            elif picture is None:
                bad_lines.append((number, f"{name} names it, and it is not there"))
            first_lines.setdefault(picture or line[0][0], number)
    except FAULTS as error:
        files.require_answered(root, error)
        reason = getattr(error, "strerror", None) or error
        yield 0, f"cannot be read: {shown(reason, 200)}"
        return
    yield from sorted(bad_lines)


class _Tree:
    """Which files are below a root and not hidden, a directory listed only once."""

    def __init__(self, root: str):
        self.root, self._names = root, {}

    def holds(self, name: str) -> bool:
        directory, _, last = name.rpartition("/")
        if directory not in self._names:
            self._names[directory] = self._list(directory)
        return last in self._names[directory]

    def _list(self, directory: str) -> set[str]:
        parts = directory.split("/") if directory else []
        if any(part.startswith(".") for part in parts) or self._linked(parts):
            return set()
        path = listing.join(self.root, directory)
        try:
            if not listing.local(path):  # what kinds they are would cost a request each
                names = [entry.name for entry in epath.Path(path).iterdir()]
                return {name for name in names if not name.startswith(".")}
            entries = listing.entries(path)
        except (OSError, ValueError) as error:
            files.require_answered(path, error)
            return set()
        not_files = (listing.FOLDER, listing.LINK)
        return {entry.name for entry in entries if entry.kind not in not_files}

    def _linked(self, parts: list[str]) -> bool:
        ends = range(1, len(parts) + 1)
        return listing.local(self.root) and any(
            os.path.islink(os.path.join(self.root, *parts[:end])) for end in ends
        )


def _picture(
    root: str, candidates: tuple[str, ...], names: Collection[str]
) -> str | None:
    """Which of these names a line is about, if it is one of `names`."""
    for place, candidate in enumerate(candidates):
        if candidate in names:
            paths = [listing.join(root, earlier) for earlier in candidates[:place]]
            # The first reading of a name that exists is the one that is meant.
            means_another = any(listing.look(path)[0] == listing.FILE for path in paths)
            return None if means_another else candidate
    return None


Line = tuple[int, tuple[tuple[str, ...], dict[str, Value]] | BadLine]


def _lines(
    root: str, directory: str, name: str, names: Collection[str] | None = None
) -> Iterator[Line]:
    """(number, (names inside root that it may mean, columns) or why not).

    Lines that clearly tell of others than `names` are passed over unparsed, in a
    third of the time: a large folder's metadata is read for each of its parts.
    """
    last_parts = None if names is None else {_last(os.fsencode(name)) for name in names}
    path = listing.join(root, listing.join(directory, name))
    full_root = os.path.abspath(root) if listing.local(root) else root
    place = listing.join(full_root, directory)
    names_inside = lambda file_name: tuple(
        listing.join(directory, name_) for name_ in _inside(file_name, place)
    )
    with epath.Path(path).open("rb") as file:
        rows = _csv_rows if name.endswith(".csv") else _json_rows
        for number, row in rows(file, last_parts):
            try:
                if isinstance(row, BadLine):
                    raise row
                file_name = row.pop("file_name", None)
                if not isinstance(file_name, str) or not file_name:
                    raise BadLine("a line without a file_name")
                yield number, (names_inside(file_name), row)
            except BadLine as error:
                candidates = []
                for name_ in error.names:
                    try:
                        candidates += names_inside(name_)
                    except BadLine:
                        continue
                yield number, BadLine(str(error), tuple(candidates))


def _json_rows(
    file: BinaryIO, last_parts: Collection[bytes] | None
) -> Iterator[tuple[int, dict | BadLine]]:
    """A line's object; blank lines are none."""
    if (encoding := _encoding(file)) == "utf-16":
        file = codecs.EncodedFile(file, "utf-8", encoding)
    for number, line in enumerate(_split(file), 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if last_parts is not None and _of_another(line, last_parts):
            continue
        try:
            yield number, _parsed(line)
        except BadLine as error:
            yield number, error


def _csv_rows(
    file: BinaryIO, last_parts: Collection[bytes] | None
) -> Iterator[tuple[int, dict | BadLine]]:
    """A row by the names of the first one; numbers are numbers but in captions.

    csv.Error, by its line, where quotes do not match: which of the lines that follow
    are rows, and which belong to a caption, cannot be told.
    """
    csv.field_size_limit(max(csv.field_size_limit(), SIDECAR))  # the module's own
    text = io.TextIOWrapper(file, _encoding(file), newline="")
    header, options = _header(text.readline(SIDECAR))
    if "file_name" not in header:
        columns = f"its columns are {shown(', '.join(header)) or 'none'}"
        advice = "rename the one with the pictures' names to file_name"
        yield 1, BadLine(f"a header without file_name: {columns}; {advice}")
        return
    as_text = {name.lower() for name in ("file_name", *STANDING, *USUAL)}
    name_column = header.index("file_name")
    for number, values in _records(csv.reader(text, strict=True, **options)):
        name = values[name_column].strip() if name_column < len(values) else ""
        last = _last(os.fsencode(name.replace("\\", "/")))
        if last_parts is not None and last not in last_parts:
            continue
        if len(values) != len(header):
            count = "fewer" if len(values) < len(header) else "more"
            reason = f"a line that cannot be read: {count} values than its header has"
            yield number, BadLine(reason, (name,))
            continue
        row = dict(zip(header, values)) | {"file_name": name}
        row.pop("", None)  # pandas' index has no name
        yield number, {k: _cell(v, k.lower() in as_text) for k, v in row.items()}


def _header(line: str) -> tuple[list[str], dict]:
    """The columns' names, without spaces around them, and how the rows are separated;
    csv.Error for a name that comes twice, or that goes on in the next line."""
    spellings = {d: next(csv.reader([line], delimiter=d), []) for d in DELIMITERS}
    names = {d: [x.strip() for x in spelt] for d, spelt in spellings.items()}
    delimiter = next((d for d in DELIMITERS if "file_name" in names[d]), ",")
    header, spelt = names[delimiter], spellings[delimiter]
    if len(line) == SIDECAR or line.count('"') % 2:
        raise csv.Error(f"line 1: wanted the columns' names: {QUOTE}")
    if twice := [x for x in header if x and header.count(x) > 1]:
        raise csv.Error(
            f'line 1: the column "{shown(twice[0])}" comes {header.count(twice[0])}'
            " times; rename or remove one"
        )
    spaced = any(name.startswith(" ") for name in spelt[1:])
    return header, {"delimiter": delimiter, "skipinitialspace": spaced}


def _records(reader) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of the rows below the header, blank ones left out."""
    first = 2
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise csv.Error(f"line {first}: {_fault(error)}") from None
        if values is None:
            return
        # A caption of several lines is fine, but not one that has a row in it.
        several = reader.line_num + 1 > first
        if several and any(ROW.search(value) for value in values):
            raise csv.Error(f"line {first}: {_fault(QUOTE)}, and takes in other rows")
        if values:
            yield first, values
        first = reader.line_num + 2


QUOTE = "a quote that is not closed; close it, or write a quote in a caption twice"


def _fault(error: object) -> str:
    """What Python's messages mean."""
    if "field limit" in str(error):
        return f"a value of more than {SIDECAR} characters"
    if "unexpected end of data" in str(error) or "expected after" in str(error):
        return QUOTE
    return str(error)


def _cell(text: str, as_text: bool) -> Value:
    if text.strip() in NULLS:
        return None
    if as_text or not NUMBER.fullmatch(text.strip()):
        return text[: items.TEXT]
    number = items.Numeral(text)
    return number if math.isfinite(number) else None


def _encoding(file: BinaryIO) -> str:
    start = file.read(2)
    file.seek(0)
    return items.encoding_of(start)


def _split(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of one that is too long no more than shows it. (A bucket's files have no
    readline with a bound.)"""
    unfinished = b""
    while block := file.read(BLOCK):
        *lines, tail = block.split(b"\n")
        for line in lines:
            yield unfinished + line
            unfinished = b""
        unfinished = (unfinished + tail)[: SIDECAR + 1]
    if unfinished:
        yield unfinished


def _of_another(line: bytes, last_parts: Collection[bytes]) -> bool:
    """Whether no file_name in it, at any depth, can end in one of these names."""
    file_names = PLAIN.findall(line)
    if len(file_names) != max(1, line.count(b"file_name")) or SPELT.search(line):
        return False
    return all(x[-1:] not in b"/." and _last(x) not in last_parts for x in file_names)


def _last(name: bytes) -> bytes:
    return name.rpartition(b"/")[2]


def _parsed(line: bytes) -> dict[str, Value]:
    names = tuple(name.decode(errors="replace") for name in PLAIN.findall(line))
    if len(line) > SIDECAR:
        raise BadLine(f"a line of more than {SIDECAR} bytes", names)
    try:
        return items.columns(line.decode())
    except ValueError as error:
        raise BadLine(f"a line that cannot be read: {shown(error)}", names) from None


def _inside(name: str, folder: str) -> list[str]:
    """What a file_name may mean inside the folder that its metadata lies in.

    Itself; or, if it begins as the folder's own path ends, what follows: people write
    it as it is from the data set's root, or with the whole path. Windows separates by
    backslashes. A BadLine if it leads elsewhere.
    """
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    above = [part for part in folder.split("/") if part]
    shared = [n for n in range(1, len(parts)) if above[-n:] == parts[:n]]
    whole = name.startswith("/")
    if whole:
        shared = [n for n in shared if n == len(above)]
    leads = whole and not shared or re.match("[A-Za-z]:/", name)
    if leads or ".." in parts:
        raise BadLine(f"a file_name that leads out of its folder: {shown(name)}")
    if not parts:
        raise BadLine("a line without a file_name")
    return ["/".join(parts)] * (not whole) + ["/".join(parts[n:]) for n in shared]
