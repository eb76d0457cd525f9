"""Whether the input is still what finished parts were made of.

A part's line in plan.json has a hash of its files' names and sizes, and one of their
times as well. Only where these differ are items looked at again: their columns, and
their pictures if the time or the size is another, against what DIR/parts says of them.
"""

import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from sd3_jax.data import ingest, listing
from sd3_jax.data.ingest import BadItem, Item, Part, Rejected
from sd3_jax.errors import UserError
from sd3_jax.outside import shown

log = logging.getLogger(__name__)
NAMED = 3  # sources of a kind in an error, at most


def row(item: Item | Rejected, crc: int | None) -> list[Any]:
    """What tells an item from a changed one; `crc` of its picture, if that was read."""
    if isinstance(item, Rejected):
        return [item.source, item.bytes, 0, None, ""]
    return [item.source, item.bytes, item.time, crc, listing.digest(item.columns)]


def path(workdir: epath.Path, number: int) -> epath.Path:
    return workdir / "parts" / f"{number:05d}.sources.jsonl"


def require_same(
    workdir: epath.Path,
    planned: Sequence[Part],
    parts: Sequence[Part],
    done: set[int],
) -> bool:
    """Compare the parts that are in the input with those that were planned; a UserError
    if what is `done` was made of other files.

    Returns whether only times differ, so that the plan may have the new ones.
    """
    if not any(part.stamp for part in planned):
        log.warning("%s: planned by an earlier version; changes are not seen", workdir)
        return False
    known, new = ({json.dumps(part): part for part in x} for x in (planned, parts))
    if known.keys() == new.keys():
        return False
    place = lambda part: json.dumps([part.path, part.label, part.spans])
    todo = {place(part) for n, part in enumerate(planned) if n not in done}
    before = {}
    for number, part in enumerate(planned):
        if number in done and json.dumps(part) not in new:
            before |= {each[0]: each for each in _rows(workdir, number)}
    added, edited = [], []
    for text, part in new.items():
        if text in known or place(part) in todo:
            continue
        for item in ingest.items(part):
            old = before.pop(item.source, None)
            if old is None:
                added.append(item.source)
            elif what := _change(item, old):
                edited.append(f"{item.source}: {what}")
    kinds = {"added": added, "removed": sorted(before), "edited": edited}
    counted = [f"{len(x):,} {kind} ({_named(x)})" for kind, x in kinds.items() if x]
    if counted:
        raise UserError(
            f"config.ingest.inputs: {', '.join(counted)} since {workdir} was made of"
            " it: give back the old files, or another workdir"
        )
    return [*map(place, planned)] == [*map(place, parts)]


def _rows(workdir: epath.Path, number: int) -> Iterator[list]:
    for line in path(workdir, number).read_text().splitlines():
        yield json.loads(line)


def _change(item: Item | Rejected, old: list) -> str:
    """What of an item is another than it was, if anything is."""
    _, size, time, crc, columns = row(item, None)
    if isinstance(item, Rejected):
        return "" if (size, columns) == (old[1], old[4]) else "the file"
    if columns != old[4]:
        return "its caption or another column"
    if size != old[1]:
        return "the picture"
    if old[3] is None or (time and time == old[2]):
        return ""
    try:
        return "" if zlib.crc32(item.read()) == old[3] else "the picture"
    except BadItem:
        return "the picture"


def _named(sources: Sequence[str]) -> str:
    more = ", …" if len(sources) > NAMED else ""
    return ", ".join(shown(each) for each in sources[:NAMED]) + more
