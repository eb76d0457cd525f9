"""Pictures and captions of other hands, planned in parts and given one by one.

Folders, WebDataset's tars and parquet files. What is not taken is given too, with the
reason, so that every file is accounted for once.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from sd3_jax.data import shards
from sd3_jax.data.ingest import folders, listing, parquet, tars, webdataset
from sd3_jax.data.ingest.items import BadItem, Item, Part, Rejected
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
        labelled = sorted(zip(_labels(paths, kinds), paths, kinds))
        planned = threads.map(lambda row: _parts(*row, size), labelled)
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
    yield from (parquet if part.kind == "parquet" else webdataset).items(part)


def _kind(path: str) -> str:
    """What an input is, or a UserError."""
    kind = listing.look(path)[0]
    if kind == listing.FOLDER:
        return "folder"
    if kind != listing.FILE:
        raise UserError(f"{path}: no such file or folder")
    _, dot, extension = epath.Path(path).name.lower().rpartition(".")
    if dot and extension == "parquet":
        return extension
    if reason := tars.compression(path):
        raise UserError(f"{path}: {reason}")
    if dot and extension == "tar":
        return extension
    raise UserError(
        f"{path}: of an unknown kind; wanted a folder, a .tar, not compressed, or a"
        " .parquet"
    )


def _check_once(paths: Sequence[str], kinds: Sequence[str]):
    path_of_file = {}
    for path in paths:
        if (file := shards.file_of(path.rstrip("/") or path)) in path_of_file:
            other = path_of_file[file]
            also = "" if other == path else f", also as {other}"
            raise UserError(f"{path}: the same input is listed twice{also}")
        path_of_file[file] = path
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
    unique_ends, ambiguous, length = {}, list(paths), 0
    while ambiguous:
        length += 1
        ends = {path: "/".join(parts[path][-length:]) for path in ambiguous}
        counts = Counter(ends.values())
        unique_ends |= {path: end for path, end in ends.items() if counts[end] == 1}
        ambiguous = [path for path in ambiguous if counts[ends[path]] > 1]
    return unique_ends


def _parts(label: str, path: str, kind: str, size: int) -> list[Part]:
    if kind == "folder":
        return list(folders.plan(path, label, size))
    if kind == "parquet":
        return parquet.plan(path, label, size)
    length, changed = listing.stat_of(path)
    known = listing.digest_file(path, length)
    stamp = listing.digest(known, changed)
    return [Part("tar", path, label, [], None, length, known, stamp)]
