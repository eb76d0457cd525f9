"""Rows of metadata.jsonl and metadata.csv: dicts of columns, or why a line is rejected.

Both readers stream. Each part of a folder reads the whole file, so lines about other
pictures than the caller's are skipped by their file_name, unparsed.
"""

import codecs
import csv
import io
import math
import os
import re
from collections.abc import Collection, Iterator
from typing import BinaryIO

from sd3_jax.data.ingest import items
from sd3_jax.data.ingest.captions import STANDING, USUAL
from sd3_jax.data.ingest.items import SIDECAR, BadItem, Value
from sd3_jax.foreign_text import shown

BLOCK = 2**20  # bytes that are read at once
# A file_name without escapes, found without parsing its line. SPELT finds escaped
# letters of the key, "file\u005fname", which would hide one from it.
PLAIN = re.compile(rb'"file_name"\s*:\s*"([^"\\]*)"')
SPELT = re.compile(rb"\\u00[56]")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
# pandas' spellings of missing and infinite values.
NULLS = {"", "nan", "NaN", "None", "null", "NULL", "<NA>", "inf", "-inf"}
DELIMITERS = ",\t;"
# A line inside a value that looks like a row of its own: the sign of an open quote.
ROW = re.compile(r"[\r\n]\s*[^,;\t\r\n]+\.(jpe?g|png|webp)\"?[,;\t]", re.IGNORECASE)
QUOTE = "a quote that is not closed; close it, or write a quote in a caption twice"


class BadLine(BadItem):
    """A rejected line; `names` are the pictures that it seems to be about."""

    def __init__(self, reason: str, names: tuple[str, ...] = ()):
        super().__init__(reason)
        self.names = names


def json_rows(
    file: BinaryIO, last_parts: Collection[bytes] | None
) -> Iterator[tuple[int, dict | BadLine]]:
    """The object of each line of a JSON Lines file, with its number from 1."""
    # UTF-16 is recoded on the fly: lines are split at byte 10, which is half a letter
    # there.
    if (encoding := _encoding(file)) == "utf-16":
        file = codecs.EncodedFile(file, "utf-8", encoding)
    for number, line in enumerate(_split_lines(file), 1):
        if number == 1:  # a byte order mark, as Windows' editors write it
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        if last_parts is not None and _is_of_another(line, last_parts):
            continue
        try:
            yield number, _parse_line(line)
        except BadLine as error:
            yield number, error


def csv_rows(
    file: BinaryIO, last_parts: Collection[bytes] | None
) -> Iterator[tuple[int, dict | BadLine]]:
    """The rows of a CSV file by its header's names; captions stay texts.

    csv.Error with the line where quotes do not match: nothing then says which of the
    lines below are rows and which are part of a caption.
    """
    # The csv module's own limit is 2^17 characters and global; it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), SIDECAR))
    text = io.TextIOWrapper(file, _encoding(file), newline="")
    header, options = _parse_header(text.readline(SIDECAR))
    if "file_name" not in header:
        columns = f"its columns are {shown(', '.join(header)) or 'none'}"
        advice = "rename the one with the pictures' names to file_name"
        yield 1, BadLine(f"a header without file_name: {columns}; {advice}")
        return
    as_text = {name.lower() for name in ("file_name", *STANDING, *USUAL)}
    name_column = header.index("file_name")
    for number, values in _csv_records(csv.reader(text, strict=True, **options)):
        name = values[name_column].strip() if name_column < len(values) else ""
        last = last_part(os.fsencode(name.replace("\\", "/")))
        if last_parts is not None and last not in last_parts:
            continue
        if len(values) != len(header):
            count = "fewer" if len(values) < len(header) else "more"
            reason = f"a line that cannot be read: {count} values than its header"
            yield number, BadLine(reason, (name,))
            continue
        row = dict(zip(header, values)) | {"file_name": name}
        row.pop("", None)  # pandas writes its index as a column without a name
        yield number, {k: _cell(v, k.lower() in as_text) for k, v in row.items()}


def last_part(name: bytes) -> bytes:
    """What follows the last slash."""
    return name.rpartition(b"/")[2]


def _parse_header(line: str) -> tuple[list[str], dict]:
    """The columns' names, stripped, and the options that csv.reader needs for the rows.

    csv.Error if a name appears twice or continues in the next line.
    """
    spellings = {d: next(csv.reader([line], delimiter=d), []) for d in DELIMITERS}
    names = {d: [x.strip() for x in spelt] for d, spelt in spellings.items()}
    delimiter = next((d for d in DELIMITERS if "file_name" in names[d]), ",")
    header, spelt = names[delimiter], spellings[delimiter]
    if len(line) == SIDECAR or line.count('"') % 2:
        raise csv.Error(f"line 1: expected the columns' names: {QUOTE}")
    if twice := [x for x in header if x and header.count(x) > 1]:
        raise csv.Error(
            f'line 1: the column "{shown(twice[0])}" comes {header.count(twice[0])}'
            " times; rename or remove one"
        )
    # `a, "b, c"`: without skipinitialspace the quote would be part of the value.
    spaced = any(name.startswith(" ") for name in spelt[1:])
    return header, {"delimiter": delimiter, "skipinitialspace": spaced}


def _csv_records(reader) -> Iterator[tuple[int, list[str]]]:
    """(line, values) of the rows below the header, without blank ones."""
    first = 2
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise csv.Error(f"line {first}: {_csv_fault(error)}") from None
        if values is None:
            return
        # A caption of several lines is fine, but not one that has a row in it.
        several = reader.line_num + 1 > first
        if several and any(ROW.search(value) for value in values):
            raise csv.Error(
                f"line {first}: {_csv_fault(QUOTE)}, and takes in other rows"
            )
        if values:
            yield first, values
        first = reader.line_num + 2


def _csv_fault(error: object) -> str:
    """A csv.Error in words that say what to change in the file."""
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
    # A column may turn out to be a caption, "007": its text is kept with the number.
    number = items.Numeral(text)
    return number if math.isfinite(number) else None


def _encoding(file: BinaryIO) -> str:
    start = file.read(2)
    file.seek(0)
    return items.encoding_of(start)


def _split_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is too long is shortened, but stays too long."""
    # Files in a bucket have no readline with a bound, and one without would read a file
    # of one line into memory.
    unfinished = b""
    while block := file.read(BLOCK):
        *lines, tail = block.split(b"\n")
        for line in lines:
            yield unfinished + line
            unfinished = b""
        unfinished = (unfinished + tail)[: SIDECAR + 1]
    if unfinished:
        yield unfinished


def _is_of_another(line: bytes, last_parts: Collection[bytes]) -> bool:
    """Whether no file_name in a line, at any depth, can end in one of these names."""
    # Only lines that are understood for sure are skipped: as many plain file_names as
    # there are mentions of the key. Doubtful ones are parsed.
    file_names = PLAIN.findall(line)
    if len(file_names) != max(1, line.count(b"file_name")) or SPELT.search(line):
        return False
    return all(
        x[-1:] not in b"/." and last_part(x) not in last_parts for x in file_names
    )


def _parse_line(line: bytes) -> dict[str, Value]:
    names = tuple(name.decode(errors="replace") for name in PLAIN.findall(line))
    if len(line) > SIDECAR:
        raise BadLine(f"a line of more than {SIDECAR} bytes", names)
    try:
        return items.columns(line.decode())
    except ValueError as error:
        raise BadLine(f"a line that cannot be read: {shown(error)}", names) from None
