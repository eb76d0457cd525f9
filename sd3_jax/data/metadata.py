"""A folder's metadata.jsonl, as Hugging Face's imagefolder has it: a line a picture.

{"file_name": "sub/a.jpg", "text": "a red fox", "aesthetic": 5.1}
"""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import BinaryIO

from etils import epath

from sd3_jax.data import items, listing
from sd3_jax.data.items import SIDECAR, BadItem, Value
from sd3_jax.outside import shown

NAME = "metadata.jsonl"
MISSING = f"{NAME} names it, and it is not there"
BLOCK = 2**20  # bytes that are read at once
PLAIN = re.compile(rb'"file_name"\s*:\s*"([^"\\]*)"')
SPELT = re.compile(rb"\\u00[56]")  # a letter of file_name that is spelt as its number


def governing(root: str, directory: str) -> list[tuple[str, int]]:
    """(directory, bytes) of each metadata.jsonl that goes for it, outermost first."""
    parts = directory.split("/") if directory else []
    found = []
    for depth in range(len(parts) + 1):
        place = "/".join(parts[:depth])
        kind, size = listing.look(listing.join(root, listing.join(place, NAME)))
        if kind == listing.FILE:
            found.append((place, size))
    return found


def columns(
    root: str, directories: Collection[str], names: Collection[str]
) -> Callable[[str], dict[str, Value]]:
    """What is said of these pictures, by name; of the others nothing is kept.

    An inner folder's words go over an outer one's. A picture whose metadata.jsonl
    cannot be read is a BadItem: it is not taken for one without a caption.
    """
    places = {place for each in directories for place, _ in governing(root, each)}
    told, failed = {}, {}
    for place in sorted(places, key=lambda each: len(each.split("/")) if each else 0):
        mine = {}
        try:
            for _, found in _lines(root, place, names):
                if not isinstance(found, BadItem) and found[0] in names:
                    mine.setdefault(*found)
        except OSError as error:
            failed[place] = error.strerror or error
        for name, more in mine.items():
            told[name] = {**told.get(name, {}), **more}

    def of(name: str) -> dict[str, Value]:
        for place, reason in failed.items():
            if not place or name.startswith(f"{place}/"):
                raise BadItem(f"its {NAME} cannot be read: {reason}")
        return told.get(name, {})

    return of


def faults(root: str, directory: str) -> Iterator[tuple[int, str]]:
    """(line, why) of lines that are not taken; line 0 if the file cannot be read."""
    first, bad = {}, []
    try:
        for number, found in _lines(root, directory):
            if isinstance(found, BadItem):
                bad.append((number, str(found)))
            elif found[0] in first:
                bad.append((number, "a file_name that came before"))
            else:
                first[found[0]] = number
    except OSError as error:
        yield 0, f"cannot be read: {error.strerror or error}"
        return
    bad += [(first[name], reason) for name, reason in _missing(root, first)]
    yield from sorted(bad)


def _missing(root: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names that no walk comes by, a directory looked at only once."""
    by_directory = defaultdict(list)
    for name in names:
        directory, _, last = name.rpartition("/")
        by_directory[directory].append(last)
    for directory, last in by_directory.items():
        parts = directory.split("/") if directory else []
        hidden = any(part.startswith(".") for part in parts)
        there = set() if hidden or _linked(root, parts) else _names(root, directory)
        for each in last:
            if each not in there:
                yield listing.join(directory, each), MISSING


def _names(root: str, directory: str) -> set[str]:
    path = listing.join(root, directory)
    try:
        if not listing.local(path):  # what else there is of that name is not asked for
            found = [each.name for each in epath.Path(path).iterdir()]
            return {name for name in found if not name.startswith(".")}
        found = listing.entries(path)
    except (OSError, ValueError):
        return set()
    gone = (listing.FOLDER, listing.LINK)
    return {each.name for each in found if each.kind not in gone}


def _linked(root: str, parts: list[str]) -> bool:
    ends = range(1, len(parts) + 1)
    return listing.local(root) and any(
        os.path.islink(os.path.join(root, *parts[:end])) for end in ends
    )


def _lines(
    root: str, directory: str, names: Collection[str] | None = None
) -> Iterator[tuple[int, tuple[str, dict] | BadItem]]:
    """(number, (name inside root, columns) or why not); blank lines are none.

    Lines that clearly tell of others than `names` are passed over unparsed, in a
    third of the time: a large folder's metadata is read for each of its parts.
    """
    last = None if names is None else {_last(os.fsencode(name)) for name in names}
    path = listing.join(root, listing.join(directory, NAME))
    with epath.Path(path).open("rb") as file:
        for number, line in enumerate(_split(file), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip() or (last is not None and _of_another(line, last)):
                continue
            try:
                name, found = _parsed(line)
                yield number, (listing.join(directory, name), found)
            except BadItem as error:
                yield number, error


def _split(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of one that is too long no more than shows it. (A bucket's files have no
    readline with a bound.)"""
    rest = b""
    while block := file.read(BLOCK):
        *lines, last = block.split(b"\n")
        for line in lines:
            yield rest + line
            rest = b""
        rest = (rest + last)[: SIDECAR + 1]
    if rest:
        yield rest


def _of_another(line: bytes, last: Collection[bytes]) -> bool:
    """Whether no file_name in it, at any depth, can end in one of these names."""
    found = PLAIN.findall(line)
    if len(found) != max(1, line.count(b"file_name")) or SPELT.search(line):
        return False
    return all(name[-1:] not in b"/." and _last(name) not in last for name in found)


def _last(name: bytes) -> bytes:
    return name.rpartition(b"/")[2]


def _parsed(line: bytes) -> tuple[str, dict[str, Value]]:
    if len(line) > SIDECAR:
        raise BadItem(f"a line of more than {SIDECAR} bytes")
    try:
        found = items.columns(line.decode())
    except ValueError as error:
        raise BadItem(f"a line that cannot be read: {shown(error)}") from None
    name = found.pop("file_name", None)
    if not isinstance(name, str):
        raise BadItem("a line without a file_name")
    return _inside(name), found


def _inside(name: str) -> str:
    """A file_name without its "." and "//"; a BadItem if it leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    leads = name.startswith("/") or "\\" in name or re.match("[A-Za-z]:/", name)
    if leads or ".." in parts:
        raise BadItem(f"a file_name that leads out of its folder: {shown(name)}")
    if not parts:
        raise BadItem("a line without a file_name")
    return "/".join(parts)
