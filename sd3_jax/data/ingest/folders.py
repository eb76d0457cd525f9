"""Folders of pictures with captions beside them, walked in order of name.

Captions of a.jpg are in a.txt, a.caption or a.json, in a.jpg.txt and so on, or in a
metadata.jsonl or .csv of its folder or one above. Hidden files and folders are skipped.
"""

import functools
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from sd3_jax import files
from sd3_jax.data.ingest import listing, metadata
from sd3_jax.data.ingest.items import (
    LABEL,
    LABELS,
    PICTURES,
    SIDECARS,
    BadItem,
    Item,
    Part,
    Rejected,
    checked_item,
    merge,
    read_at,
    read_columns,
    rejected,
)
from sd3_jax.data.ingest.listing import FILE, FOLDER, LINK, OTHER, Entry
from sd3_jax.errors import UserError

# Nanoseconds in which a directory may change twice and keep one time: FAT's clock, the
# coarsest that is common, ticks every two seconds.
COARSE = 2 * 10**9
UNFIT = {
    LINK: "a link to a folder, which is not followed",
    OTHER: "cannot be read: not a file, or a link to none",
}
NOT_READ = {
    "metadata.parquet": "a metadata.parquet, which is not read; expected metadata.jsonl"
}


class Subject(NamedTuple):
    """A picture with its sidecars, or another file; each is counted once."""

    name: str
    reason: str = ""  # why it is rejected
    sidecars: tuple[Entry, ...] = ()  # of a picture


class Contents(NamedTuple):
    """What a directory holds now."""

    subjects: list[Subject]
    folders: list[str]
    names: str  # a hash of the names and kinds of all entries


def plan(path: str, label: str, size: int) -> Iterator[Part]:
    """Plan parts of at most `size` files; UserError if the folder holds no picture.

    Small directories share a part with those after them.
    """
    waiting, open_part, pictures = [""], _Planned(path, label), 0
    while waiting:
        directory = waiting.pop()
        contents = _contents(path, directory)
        # Depth first, in order of name: sources come in one order, whatever the parts.
        waiting += [
            listing.join(directory, name) for name in reversed(contents.folders)
        ]
        pictures += sum(is_picture(s.name) and not s.reason for s in contents.subjects)
        first = 0
        while True:  # once for an empty directory too: its part sees files added
            number = min(size - open_part.weight, len(contents.subjects) - first)
            open_part.add(directory, contents, first, number)
            first += number
            if open_part.full(size):
                yield open_part.part()
                open_part = _Planned(path, label)
            if first == len(contents.subjects):
                break
    if not pictures:
        raise UserError(
            f"{path}: contains no pictures; their names must end in"
            f" {', '.join(PICTURES)}. For tars or parquet files, give a glob such as"
            f" {listing.join(path, '*.tar')}"
        )
    if open_part.spans:
        yield open_part.part()


def items(part: Part) -> Iterator[Item | Rejected]:
    """Yield each file of a planned part once; UserError if the part has changed."""
    # The same spans are planned again and the hashes compared: positions in a directory
    # mean other files as soon as one is added before them.
    replanned, by_directory = _Planned(part.path, part.label), []
    for directory, first, number in part.spans:
        contents = _contents(part.path, directory)
        stats = replanned.add(directory, contents, first, number)
        by_directory.append((directory, list(zip(contents.subjects[first:], stats))))
    if replanned.part().listing != part.listing:
        where = listing.join(part.path, part.spans[0][0])
        subjects = [s for _, pairs in by_directory for s, _ in pairs]
        if unread := [s.reason for s in subjects if not s.name]:
            raise UserError(f"{where}, or a folder after it: {unread[0]}")
        raise UserError(
            f"{where}: here or in a later folder, files were added, removed or changed"
            " since the job began; restore them, or start over in another workdir"
        )
    names = {
        listing.join(d, s.name) for d, subjects in by_directory for s, _ in subjects
    }
    directories = {directory for directory, _ in by_directory}
    columns_of = metadata.columns(part.path, directories, names)
    for directory, subjects in by_directory:
        for subject, stat in subjects:
            yield from _outcome(part, directory, subject, *stat, columns_of)


def is_picture(name: str) -> bool:
    return _split(name)[1] in PICTURES


class _Planned:
    """A part under construction. The same spans and files give the same hash."""

    def __init__(self, path: str, label: str):
        self.path, self.label, self.spans = path, label, []
        self.hashes, self.stamps = [], []
        self.count = self.bytes = self.weight = 0

    def add(
        self, directory: str, contents: Contents, first: int, number: int
    ) -> list[tuple[int, int]]:
        """Add `number` subjects of a directory; returns their bytes and times."""
        subjects = contents.subjects[first : first + number]
        groups = [[s.name, *(entry.name for entry in s.sidecars)] for s in subjects]
        names = [listing.join(directory, name) for group in groups for name in group]
        stats = listing.stats([listing.join(self.path, name) for name in names])
        sizes = [size for size, _ in stats]
        governing = metadata.governing(self.path, directory)
        # Times go into `stamps` alone: of a file that was only touched or copied the
        # stamp changes, after which contents are compared, but not the listing.
        self.spans.append([directory, first, number])
        self.hashes.append(
            listing.digest(directory, first, contents.names, governing, sizes)
        )
        paths = [listing.join(self.path, listing.join(*row[:2])) for row in governing]
        self.stamps.append(listing.digest(stats, listing.stats(paths)))
        self.count += sum(s.name not in metadata.NAMES for s in subjects)
        self.bytes += sum(size for size in sizes if size > 0)
        self.weight += number
        remaining_stats = iter(stats)
        return [[next(remaining_stats) for _ in group][0] for group in groups]

    def full(self, size: int) -> bool:
        return self.weight >= size or len(self.spans) >= size

    def part(self) -> Part:
        return Part(
            kind="folder",
            path=self.path,
            label=self.label,
            spans=self.spans,
            count=self.count,
            bytes=self.bytes,
            listing=listing.digest(self.hashes),
            stamp=listing.digest(self.hashes, self.stamps),
        )


def _contents(root: str, directory: str) -> Contents:
    """List a directory once for its parts, as long as its time does not change."""
    where = listing.join(root, directory)
    try:
        stamp = None if files.remote(where) else os.stat(where).st_mtime_ns
    except OSError:
        stamp = None
    # A directory that changed just now may change again under the same time.
    if stamp is None or time.time_ns() - stamp < COARSE:
        return _read_contents.__wrapped__(root, directory, stamp)  # past the cache
    return _read_contents(root, directory, stamp)


@functools.lru_cache(2)
def _read_contents(root: str, directory: str, stamp: int | None) -> Contents:
    try:
        entries = listing.entries(listing.join(root, directory))
    except OSError as error:
        files.require_answered(root, error)
        if not directory:
            reason = error.strerror or error
            raise UserError(f"{root}: cannot be read: {reason}") from None
        reason = f"cannot be read: {error.strerror or error}"
        return Contents([Subject("", reason)], [], "")
    folders = [entry.name for entry in entries if entry.kind == FOLDER]
    return Contents(_subjects(entries), folders, listing.digest(entries))


def _subjects(entries: list[Entry]) -> list[Subject]:
    rows = [(entry, *_split(entry.name)) for entry in entries if entry.kind != FOLDER]
    pictures = [row for row in rows if row[2] in PICTURES]
    # a.txt or a.jpg.txt of a.jpg; of A.JPG also A.jpg.txt
    pictured = {x for _, a, b in pictures for x in (_owner(a), f"{a}.{b}")}
    sidecar_of = {}  # stem and extension → the first of them, a.TXT before a.txt
    for entry, stem, extension in rows:
        if extension in SIDECARS and entry.kind != LINK:
            if (owner := _owner(stem)) in pictured:
                sidecar_of.setdefault((owner, extension), entry)
    # Every entry becomes one subject, or is the sidecar of one.
    subjects = []
    for entry, stem, extension in rows:
        sidecar = sidecar_of.get((_owner(stem), extension))
        reason, sidecars = UNFIT.get(entry.kind, ""), ()
        if sidecar is entry:
            continue  # accounted for with its picture
        # OneTrainer's a-masklabel.png is no picture of its own.
        if not reason and extension in PICTURES and stem.endswith(LABELS):
            reason = LABEL
        if not reason and extension in PICTURES:
            owners = _owner(stem), f"{stem}.{extension}"
            # a.txt and then a.jpg.txt, each in the order in which later kinds override.
            keys = [(owner, kind) for owner in owners for kind in SIDECARS]
            sidecars = tuple(sidecar_of[key] for key in keys if key in sidecar_of)
        elif not reason:
            reason = _unfit(entry.name, extension, again=sidecar is not None)
        subjects.append(Subject(entry.name, reason, sidecars))
    return subjects


def _unfit(name: str, extension: str, *, again: bool) -> str:
    if name in metadata.NAMES:
        return ""
    if again:
        return "a second sidecar of its kind"
    if extension in SIDECARS:
        return "a caption without a picture"
    return NOT_READ.get(name, "not JPEG, PNG or WebP by its name")


def _outcome(
    part: Part, directory: str, subject: Subject, size: int, time_: int, columns_of
) -> Iterator:
    inside = listing.join(directory, subject.name)
    source, path = part.label + inside, listing.join(part.path, inside)
    if subject.name in metadata.NAMES and not subject.reason:
        for line, reason in metadata.faults(part.path, directory, subject.name):
            yield rejected(f"{source}:{line}" if line else source, reason)
        return
    if subject.reason:
        yield rejected(source if subject.name else f"{source}/", subject.reason, size)
        return
    try:
        # Metadata first: sidecars override it.
        columns = dict(columns_of(inside))
        for sidecar in subject.sidecars:
            extension = _split(sidecar.name)[1]
            if sidecar.kind != FILE:
                raise BadItem(f"its .{extension} cannot be read: not a file")
            sidecar_path = listing.join(
                part.path, listing.join(directory, sidecar.name)
            )
            columns = merge(columns, read_columns(sidecar_path, extension))
    except BadItem as error:
        yield rejected(source, error, size)
    else:
        yield checked_item(source, columns, partial(read_at, path), max(0, size), time_)


def _owner(stem: str) -> str:
    """A sidecar's stem with a picture's extension in lower case: A.JPG as A.jpg."""
    name, extension = _split(stem)
    return f"{name}.{extension}" if extension in PICTURES else stem


def _split(name: str) -> tuple[str, str]:
    """(stem up to the last dot, extension in lower case)."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")
