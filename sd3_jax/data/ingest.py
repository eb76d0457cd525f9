"""Pictures and captions of other hands, planned in parts and given one by one.

Folders, WebDataset's tars and parquet files. What is not taken is given too, with the
reason, so that every file is accounted for once.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from etils import epath

from sd3_jax.data import folders, listing, parquet, shards, tars
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
from sd3_jax.errors import UserError

__all__ = ["BadItem", "Item", "Part", "Rejected", "items", "plan"]
THREADS = 32  # that look at files at start


def plan(inputs: Sequence[str], *, size: int = 4096) -> list[Part]:
    """What to do, in an order that depends on the files alone; or a UserError.

    Inputs are folders, tars and parquet files, or globs of them. Parts of a folder are
    of at most `size` pictures, those of a parquet file of as many rows if its row
    groups are no larger; a tar is one part.
    """
    if size < 1:
        raise UserError(f"parts of {size} pictures; wanted 1 or more")
    paths = [path for pattern in inputs for path in shards.expand(pattern)]
    if not paths:
        raise UserError("no input; wanted folders, tars or parquet files, or globs")
    with ThreadPoolExecutor(THREADS) as threads:
        kinds = list(threads.map(_kind, paths))
        _check_once(paths, kinds)
        found = sorted(zip(_labels(paths, kinds), paths, kinds))
        planned = threads.map(lambda each: _parts(*each, size), found)
        return [part for parts in planned for part in parts]


def items(part: Part) -> Iterator[Item | Rejected]:
    """All of a part, each file once, in an order of its own; no picture is opened.

    A UserError if files were added, removed or changed since it was planned. What a
    parquet file gives holds its picture in memory; the others only say where it is.
    """
    if part.kind == "folder":
        yield from folders.items(part)
        return
    kind, length = listing.look(part.path)
    if kind != listing.FILE or listing.digest_file(part.path, length) != part.listing:
        raise UserError(
            f"{part.path}: not what was planned: removed or changed since; begin anew,"
            " in another folder"
        )
    yield from (parquet.items if part.kind == "parquet" else _members)(part)


def _kind(path: str) -> str:
    """What an input is, or a UserError."""
    kind = listing.look(path)[0]
    if kind == listing.FOLDER:
        return "folder"
    if kind != listing.FILE:
        raise UserError(f"{path}: no such file or folder")
    _, dot, extension = epath.Path(path).name.rpartition(".")
    if dot and extension.lower() in ("tar", "parquet"):
        return extension.lower()
    raise UserError(
        f"{path}: of an unknown kind; wanted a folder, a .tar, not compressed, or a"
        " .parquet"
    )


def _check_once(paths: Sequence[str], kinds: Sequence[str]):
    before = {}
    for path in paths:
        if (file := shards.file_of(path.rstrip("/") or path)) in before:
            also = "" if before[file] == path else f", also as {before[file]}"
            raise UserError(f"{path}: the same input is listed twice{also}")
        before[file] = path
    roots = {os.path.realpath(p): p for p, k in zip(paths, kinds) if k == "folder"}
    for root, path in roots.items():
        for other in map(str, epath.Path(root).parents):
            if other in roots:
                raise UserError(f"{path}: lies in {roots[other]}, which is listed too")


def _labels(paths: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """What each input's sources begin with: no more of its path than tells them apart.

    Nothing, for the only folder.
    """
    folders_ = [path for path, kind in zip(paths, kinds) if kind == "folder"]
    files = [path for path, kind in zip(paths, kinds) if kind != "folder"]
    ends = _ends(files)
    if len(folders_) == 1:
        ends[folders_[0]] = ""
    else:
        ends |= {path: f"{end}/" for path, end in _ends(folders_).items()}
    return [ends[path] for path in paths]


def _ends(paths: Sequence[str]) -> dict[str, str]:
    whole = lambda path: os.path.abspath(path) if listing.local(path) else path
    parts = {path: epath.Path(whole(path)).parts for path in paths}
    found, left, length = {}, list(paths), 0
    while left:
        length += 1
        ends = {path: "/".join(parts[path][-length:]) for path in left}
        times = Counter(ends.values())
        found |= {path: end for path, end in ends.items() if times[end] == 1}
        left = [path for path in left if times[ends[path]] > 1]
    return found


def _parts(label: str, path: str, kind: str, size: int) -> list[Part]:
    if kind == "folder":
        return list(folders.plan(path, label, size))
    if kind == "parquet":
        return parquet.plan(path, label, size)
    length = listing.look(path)[1]
    known = listing.digest_file(path, length)
    return [Part("tar", path, label, [], None, length, known)]


def _members(part: Part) -> Iterator[Item | Rejected]:
    """A tar's samples and, where they stand, the members that are not taken."""
    key, sample, seen = "", {}, set()
    try:
        for place in tars.places(part.path):
            if place.reason == tars.FOLDER:
                continue
            if place.reason:
                yield _refused(part, place, place.reason)
                continue
            if place.key != key:
                yield from _sample(part, sample)
                seen.add(key)
                key, sample = place.key, {}
            if place.key in seen or place.extension in sample:
                yield _refused(part, place, "a name that came before")
            elif place.extension in PICTURES and _picture(sample):
                yield _refused(part, place, "another picture of its sample")
            else:
                sample[place.extension] = place
        yield from _sample(part, sample)
    except tars.BadTar as error:
        yield from _sample(part, sample, cut=True)
        reason = str(error).removeprefix(f"{part.path}: ")
        yield rejected(part.label, f"a damaged tar: {reason}", part.bytes)


def _sample(part: Part, sample: dict, *, cut: bool = False) -> Iterator:
    """The item of members that share a key, or why they are none.

    Where the tar is cut off a caption may have followed: alone, a picture is not taken.
    """
    picture = _picture(sample)
    beside = [sample[kind] for kind in reversed(SIDECARS) if kind in sample]
    if not picture:
        for place in beside:
            yield _refused(part, place, "a caption without a picture")
        return
    if cut and not beside:
        yield _refused(part, picture, "its tar is cut off after it")
        return
    try:
        columns = {}
        for place in beside:  # json, and txt over it
            where = (part.path, place.extension, place.start, place.size)
            columns |= read_columns(*where)
    except BadItem as error:
        yield _refused(part, picture, error)
        return
    read = partial(read_at, part.path, picture.start, picture.size)
    yield taken(f"{part.label}:{picture.key}", columns, read, picture.size)


def _picture(sample: dict) -> tars.Place | None:
    return next((sample[kind] for kind in sample if kind in PICTURES), None)


def _refused(part: Part, place: tars.Place, reason: object) -> Rejected:
    return rejected(f"{part.label}:{place.name}", reason, place.size)
