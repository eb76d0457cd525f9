"""A folder's metadata.jsonl or metadata.csv, as in Hugging Face's imagefolder.

    {"file_name": "sub/a.jpg", "text": "a red fox", "aesthetic": 5.1}

A file covers its folder and the folders inside.
"""

import csv
import os
import re
from collections.abc import Callable, Collection, Iterator

from etils import epath

from sd3_jax import files
from sd3_jax.data.ingest import items, listing
from sd3_jax.data.ingest.items import BadItem, Value
from sd3_jax.data.ingest.metadata_rows import BadLine, csv_rows, json_rows, last_part
from sd3_jax.foreign_text import shown

NAMES = ("metadata.csv", "metadata.jsonl")  # columns of the later override the earlier
FAULTS = (OSError, UnicodeError, csv.Error)  # of a whole file


def governing(root: str, directory: str) -> list[tuple[str, str, int]]:
    """(directory, name, bytes) of the metadata files that cover a directory, outermost
    first."""
    parts = directory.split("/") if directory else []
    governing_files = []
    # Every folder from the root down may have metadata for what lies below it.
    for depth in range(len(parts) + 1):
        parent = "/".join(parts[:depth])
        for name in NAMES:
            path = listing.join(root, listing.join(parent, name))
            kind, size, _ = listing.look(path)
            if kind == listing.FILE:
                governing_files.append((parent, name, size))
    return governing_files


def columns(
    root: str, directories: Collection[str], names: Collection[str]
) -> Callable[[str], dict[str, Value]]:
    """Read the columns of these pictures; returns a function from name to columns.

    Columns of an inner folder's file override those of an outer one's. The function
    raises BadItem if a picture's line, or a file that covers it, cannot be read: the
    picture must not pass for one without a caption.
    """
    governing_files = {
        row[:2] for directory in directories for row in governing(root, directory)
    }
    depth = lambda file: len(file[0].split("/")) if file[0] else 0
    columns_of, bad_lines, bad_files = {}, {}, {}
    # Outer files first, so that inner ones override them.
    for folder, name in sorted(governing_files, key=lambda file: (depth(file), file)):
        first_columns = {}  # by picture; the first line about it counts
        try:
            for _, line in _lines(root, folder, name, names):
                if isinstance(line, BadLine):
                    for picture in set(line.names) & set(names):
                        bad_lines.setdefault(picture, f"its line in {name}: {line}")
                elif picture := _picture(root, line[0], names):
                    first_columns.setdefault(picture, line[1])
        except FAULTS as error:
            files.require_answered(root, error)
            bad_files[folder, name] = getattr(error, "strerror", None) or error
        for picture, line_columns in first_columns.items():
            columns_of[picture] = items.merge(columns_of.get(picture, {}), line_columns)

    # A line that was read wins over a bad one: an outer file's fault is no loss where
    # the inner file names the picture.
    def columns_for(picture: str) -> dict[str, Value]:
        for (folder, name), reason in bad_files.items():
            if not folder or picture.startswith(f"{folder}/"):
                raise BadItem(f"its {name} cannot be read: {shown(reason, 200)}")
        if picture in bad_lines and picture not in columns_of:
            raise BadItem(bad_lines[picture])
        return columns_of.get(picture, {})

    return columns_for


def faults(root: str, directory: str, name: str) -> Iterator[tuple[int, str]]:
    """(line, reason) of rejected lines; line 0 if the file cannot be read at all."""
    first_lines, bad_lines, tree = {}, [], _Tree(root)
    try:
        for number, line in _lines(root, directory, name):
            if isinstance(line, BadLine):
                bad_lines.append((number, str(line)))
                continue
            picture = next(filter(tree.holds, line[0]), None)
            if (picture or line[0][0]) in first_lines:
                bad_lines.append((number, "a duplicate file_name"))
            elif picture is None:
                bad_lines.append((number, f"{name} names it, but it does not exist"))
            first_lines.setdefault(picture or line[0][0], number)
    except FAULTS as error:
        files.require_answered(root, error)
        reason = getattr(error, "strerror", None) or error
        yield 0, f"cannot be read: {shown(reason, 200)}"
        return
    # In order of line, whichever check found them.
    yield from sorted(bad_lines)


class _Tree:
    """Which files lie below a root and are not hidden; lists a directory only once."""

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
            if files.remote(path):  # their kinds would cost a request each
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
        return not files.remote(self.root) and any(
            os.path.islink(os.path.join(self.root, *parts[:end])) for end in ends
        )


def _picture(
    root: str, candidates: tuple[str, ...], names: Collection[str]
) -> str | None:
    """The picture among `names` that a line is about, if it is about one of them."""
    for rank, candidate in enumerate(candidates):
        if candidate in names:
            paths = [listing.join(root, earlier) for earlier in candidates[:rank]]
            # file_name has several readings (`_inside`); the first whose file exists
            # is meant, and that may be a picture of another part.
            means_another = any(listing.look(path)[0] == listing.FILE for path in paths)
            return None if means_another else candidate
    return None


Line = tuple[int, tuple[tuple[str, ...], dict[str, Value]] | BadLine]


def _lines(
    root: str, directory: str, name: str, names: Collection[str] | None = None
) -> Iterator[Line]:
    """(number, (names inside root that the line may mean, columns) or a BadLine).

    Lines that are clearly about other pictures than `names` are skipped unparsed, in a
    third of the time: a large folder's metadata is read for each of its parts.
    """
    last_parts = (
        None if names is None else {last_part(os.fsencode(name)) for name in names}
    )
    path = listing.join(root, listing.join(directory, name))
    folder = listing.join(files.absolute(root), directory)
    names_inside = lambda file_name: tuple(
        listing.join(directory, name_) for name_ in _inside(file_name, folder)
    )
    with epath.Path(path).open("rb") as file:
        rows = csv_rows if name.endswith(".csv") else json_rows
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


def _inside(name: str, folder: str) -> list[str]:
    """The readings of a file_name, relative to the folder of its metadata file.

    First the name itself. If it begins as the folder's path ends, then also what
    follows: people write names from the data set's root, or whole paths. Backslashes
    separate too, as on Windows. BadLine if the name leads out of the folder.
    """
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    above = [part for part in folder.split("/") if part]
    shared = [n for n in range(1, len(parts)) if above[-n:] == parts[:n]]
    # Of an absolute path only the reading that starts below this very folder counts.
    is_absolute = name.startswith("/")
    if is_absolute:
        shared = [n for n in shared if n == len(above)]
    leads_out = is_absolute and not shared or re.match("[A-Za-z]:/", name)
    if leads_out or ".." in parts:
        raise BadLine(f"a file_name that leads out of its folder: {shown(name)}")
    if not parts:
        raise BadLine("a line without a file_name")
    return ["/".join(parts)] * (not is_absolute) + ["/".join(parts[n:]) for n in shared]
