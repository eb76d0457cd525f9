"""The input of pictures and captions, planned in parts and read one item at a time.

Inputs are folders, WebDataset tars and parquet files. Rejected files are yielded too,
with the reason, so that every file is counted once.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from sd3_jax import files
from sd3_jax.data import shards
from sd3_jax.data.ingest import folders, listing, parquet, tars, webdataset
from sd3_jax.data.ingest.items import BadItem, Item, Part, Rejected, whole_file
from sd3_jax.errors import UserError

__all__ = ["BadItem", "Item", "Part", "Rejected", "items", "plan"]
THREADS = 32  # that open inputs at the start


def plan(inputs: Sequence[str], *, size: int = 4096) -> list[Part]:
    """Plan the parts of inputs, in an order that depends on the files alone.

    Inputs are folders, tars and parquet files, or globs of them. A part of a folder has
    at most `size` pictures; one of a parquet file as many rows, unless a row group has
    more; a tar is one part. UserError if an input is missing, unknown or listed twice.
    """
    if size < 1:
        raise UserError(f"parts of {size} pictures; expected 1 or more")
    paths = [path for pattern in inputs for path in shards.expand(pattern)]
    if not paths:
        raise UserError(
            "no input; set folders, tars or parquet files, or globs of them"
        )
    with ThreadPoolExecutor(THREADS) as threads:
        kinds = list(threads.map(_kind, paths))
        _check_once(paths, kinds)
        # By label, so that the order of arguments and of a glob does not matter.
        labelled = sorted(zip(_labels(paths, kinds), paths, kinds))
        planned = threads.map(lambda row: _parts(*row, size), labelled)
        return [part for parts in planned for part in parts]


def items(part: Part) -> Iterator[Item | Rejected]:
    """Yield a part's items, each file once, in a fixed order; opens no picture.

    Items of a parquet file hold their pictures in memory; those of folders and tars
    only say where they lie. UserError if files changed since the part was planned.
    """
    if part.kind == "folder":
        yield from folders.items(part)
        return
    # Of a folder `folders.items` checks this itself.
    now = whole_file(part.kind, part.path, part.label)
    if listing.look(part.path)[0] != listing.FILE or now.listing != part.listing:
        raise UserError(
            f"{part.path}: was removed or changed since the job began; restore it, or"
            " start over in another workdir"
        )
    yield from (parquet if part.kind == "parquet" else webdataset).items(part)


def _kind(path: str) -> str:
    """The kind of an input, by its extension; or a UserError."""
    kind = listing.look(path)[0]
    if kind == listing.FOLDER:
        return "folder"
    if kind != listing.FILE:
        raise UserError(f"{path}: no such file or folder")
    _, dot, extension = epath.Path(path).name.lower().rpartition(".")
    if dot and extension == "parquet":
        return extension
    # Before the extension .tar: a compressed tar is often named so as well.
    if reason := tars.compression(path):
        raise UserError(f"{path}: {reason}")
    if dot and extension == "tar":
        return extension
    raise UserError(
        f"{path}: unknown kind of input; expected a folder, an uncompressed .tar or a"
        " .parquet"
    )


def _check_once(paths: Sequence[str], kinds: Sequence[str]):
    # Two spellings of one input, or a link to it, are one file to the file system.
    identities = [shards.file_of(path.rstrip("/") or path) for path in paths]
    shards.require_once("input", paths, identities)
    # A folder inside another would give its pictures twice, under two sources.
    roots = {os.path.realpath(p): p for p, k in zip(paths, kinds) if k == "folder"}
    for root, path in roots.items():
        for other in map(str, epath.Path(root).parents):
            if other in roots:
                raise UserError(
                    f"{path}: is inside {roots[other]}, which is listed too; remove one"
                    " of them"
                )


def _labels(paths: Sequence[str], kinds: Sequence[str]) -> list[str]:
    """The prefix of each input's sources: as much of its path as tells inputs apart.

    The only folder has none.
    """
    # Sources stay the same when a set is moved, which whole paths would not.
    folders_ = [path for path, kind in zip(paths, kinds) if kind == "folder"]
    ends = _ends([path for path, kind in zip(paths, kinds) if kind != "folder"])
    if len(folders_) == 1:
        ends[folders_[0]] = ""
    else:
        ends |= {path: f"{end}/" for path, end in _ends(folders_).items()}
    return [ends[path] for path in paths]


def _ends(paths: Sequence[str]) -> dict[str, str]:
    # Ends of paths, lengthened where two are alike: a/x.tar and b/x.tar need their
    # folders, c.tar does not.
    parts = {path: epath.Path(files.absolute(path)).parts for path in paths}
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
    # A tar has no index, so it cannot be divided without reading all its headers.
    return [whole_file("tar", path, label)]
