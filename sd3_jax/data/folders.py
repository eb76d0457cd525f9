"""Folders of pictures with their captions beside them, walked in order of name.

Captions stand in a.txt or a.json beside a.jpg, or in a folder's metadata.jsonl, which
goes for the folders in it too. Hidden files and folders are not looked at.
"""

import functools
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from sd3_jax.data import listing, metadata
from sd3_jax.data.items import (
    PICTURES,
    SIDECARS,
    BadItem,
    Item,
    Part,
    Rejected,
    read_at,
    read_columns,
    rejected,
    taken,
)
from sd3_jax.data.listing import FILE, FOLDER, LINK, OTHER, Entry
from sd3_jax.errors import UserError

COARSE = 2 * 10**9  # ns in which a directory may change twice under one time
UNFIT = {
    LINK: "a link to a folder, which is not followed",
    OTHER: "cannot be read: not a file, or a link to none",
}
NOT_READ = {
    f"metadata.{kind}": f"a metadata.{kind}, which is not read; wanted metadata.jsonl"
    for kind in ("csv", "parquet")
}


class Subject(NamedTuple):
    """What is accounted for once: a picture, or a file that is none."""

    name: str
    reason: str = ""  # why it is rejected
    sidecars: tuple[Entry, ...] = ()  # of a picture


class Seen(NamedTuple):
    """A directory as it is now."""

    subjects: list[Subject]
    folders: list[str]
    names: str  # a hash of all that is in it


def plan(path: str, label: str, size: int) -> Iterator[Part]:
    """Parts of at most `size` pictures and other files; a UserError if it holds no
    picture. A small directory shares a part with those after it."""
    waiting, open_part, pictures = [""], _Planned(path, label), 0
    while waiting:
        directory = waiting.pop()
        seen = _look(path, directory)
        waiting += [listing.join(directory, name) for name in reversed(seen.folders)]
        pictures += sum(is_picture(s.name) and not s.reason for s in seen.subjects)
        first = 0
        while True:
            number = min(size - open_part.weight, len(seen.subjects) - first)
            open_part.add(directory, seen, first, number)
            first += number
            if open_part.full(size):
                yield open_part.made()
                open_part = _Planned(path, label)
            if first == len(seen.subjects):
                break
    if not pictures:
        raise UserError(
            f"{path}: no picture in it, wanted {', '.join(PICTURES)} by their names;"
            f" for tars or parquet files, a glob as {listing.join(path, '*.tar')}"
        )
    if open_part.spans:
        yield open_part.made()


def items(part: Part) -> Iterator[Item | Rejected]:
    """Each file of a planned part once; a UserError if it is not as it was planned."""
    again, work = _Planned(part.path, part.label), []
    for directory, first, number in part.spans:
        seen = _look(part.path, directory)
        sizes = again.add(directory, seen, first, number)
        work.append((directory, list(zip(seen.subjects[first:], sizes))))
    if again.made().listing != part.listing:
        where = listing.join(part.path, part.spans[0][0])
        if unread := [s.reason for _, found in work for s, _ in found if not s.name]:
            raise UserError(f"{where}, or a folder after it: {unread[0]}")
        raise UserError(
            f"{where}: not what was planned: here, or in a folder after it, files were"
            " added, removed or changed since; begin anew, in another folder"
        )
    names = {listing.join(d, s.name) for d, found in work for s, _ in found}
    told = metadata.columns(part.path, {directory for directory, _ in work}, names)
    for directory, subjects in work:
        for subject, size in subjects:
            yield from _outcome(part, directory, subject, size, told)


def is_picture(name: str) -> bool:
    return _split(name)[1] in PICTURES


class _Planned:
    """A part in the making; made from the same spans again, it has the same hash."""

    def __init__(self, path: str, label: str):
        self.path, self.label, self.spans, self.hashes = path, label, [], []
        self.count = self.bytes = self.weight = 0

    def add(self, directory: str, seen: Seen, first: int, number: int) -> list[int]:
        """Takes so many subjects of a directory, and gives their bytes."""
        subjects = seen.subjects[first : first + number]
        files = [[s.name, *(each.name for each in s.sidecars)] for s in subjects]
        places = [listing.join(directory, name) for each in files for name in each]
        sizes = listing.sizes([listing.join(self.path, place) for place in places])
        governing = metadata.governing(self.path, directory)
        self.spans.append([directory, first, number])
        self.hashes.append(
            listing.digest(directory, first, seen.names, governing, sizes)
        )
        self.count += sum(s.name != metadata.NAME for s in subjects)
        self.bytes += sum(size for size in sizes if size > 0)
        self.weight += number
        left = iter(sizes)
        return [[next(left) for _ in each][0] for each in files]

    def full(self, size: int) -> bool:
        return self.weight >= size or len(self.spans) >= size

    def made(self) -> Part:
        return Part(
            kind="folder",
            path=self.path,
            label=self.label,
            spans=self.spans,
            count=self.count,
            bytes=self.bytes,
            listing=listing.digest(self.hashes),
        )


def _look(root: str, directory: str) -> Seen:
    """A directory of many parts is listed once, as long as it does not change."""
    where = listing.join(root, directory)
    try:
        stamp = os.stat(where).st_mtime_ns if listing.local(where) else None
    except OSError:
        stamp = None
    if stamp is None or time.time_ns() - stamp < COARSE:
        return _listed.__wrapped__(root, directory, stamp)
    return _listed(root, directory, stamp)


@functools.lru_cache(2)
def _listed(root: str, directory: str, stamp: int | None) -> Seen:
    try:
        found = listing.entries(listing.join(root, directory))
    except OSError as error:
        if not directory:
            reason = error.strerror or error
            raise UserError(f"{root}: cannot be read: {reason}") from None
        reason = f"cannot be read: {error.strerror or error}"
        return Seen([Subject("", reason)], [], "")
    folders = [each.name for each in found if each.kind == FOLDER]
    return Seen(_subjects(found), folders, listing.digest(found))


def _subjects(found: list[Entry]) -> list[Subject]:
    files = [(each, *_split(each.name)) for each in found if each.kind != FOLDER]
    pictured = {stem for _, stem, extension in files if extension in PICTURES}
    beside = {}  # stem and extension → the first of them, a.TXT before a.txt
    for each, stem, extension in files:
        if extension in SIDECARS and stem in pictured and each.kind != LINK:
            beside.setdefault((stem, extension), each)
    subjects = []
    for each, stem, extension in files:
        known, reason, kept = (
            beside.get((stem, extension)),
            UNFIT.get(each.kind, ""),
            (),
        )
        if known is each:
            continue  # accounted for with its picture
        if not reason and extension in PICTURES:
            # json first: what txt says of "caption" goes over it
            found_by = [beside.get((stem, kind)) for kind in reversed(SIDECARS)]
            kept = tuple(sidecar for sidecar in found_by if sidecar)
        elif not reason:
            reason = _unfit(each.name, extension, again=known is not None)
        subjects.append(Subject(each.name, reason, kept))
    return subjects


def _unfit(name: str, extension: str, *, again: bool) -> str:
    if name == metadata.NAME:
        return ""
    if again:
        return "a second sidecar of its kind"
    if extension in SIDECARS:
        return "a caption without a picture"
    return NOT_READ.get(name, "not JPEG, PNG or WebP by its name")


def _outcome(part: Part, directory: str, subject: Subject, size: int, told) -> Iterator:
    inside = listing.join(directory, subject.name)
    source, path = part.label + inside, listing.join(part.path, inside)
    if subject.name == metadata.NAME and not subject.reason:
        for line, reason in metadata.faults(part.path, directory):
            yield rejected(f"{source}:{line}" if line else source, reason)
        return
    if subject.reason:
        yield rejected(source if subject.name else f"{source}/", subject.reason, size)
        return
    try:
        columns = dict(told(inside))
        for each in subject.sidecars:
            extension = _split(each.name)[1]
            if each.kind != FILE:
                raise BadItem(f"its .{extension} cannot be read: not a file")
            beside = listing.join(part.path, listing.join(directory, each.name))
            columns |= read_columns(beside, extension)
    except BadItem as error:
        yield rejected(source, error, size)
    else:
        yield taken(source, columns, partial(read_at, path), max(0, size))


def _split(name: str) -> tuple[str, str]:
    """Up to the last dot, and what follows it in lower case."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")
