"""Comparing the input of a resumed job with what its finished parts were made of.

A part's line in plan.json has a hash of its files' names and sizes, and one with their
times. Only where these differ are items read again: their columns, and their pictures
if time or size differ. They are compared with the rows in DIR/parts.
"""

import bisect
import json
import logging
import zlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from sd3_jax.data.ingest import input_parts, listing
from sd3_jax.data.ingest.input_parts import BadItem, Item, Part, Rejected
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

log = logging.getLogger(__name__)
NAMED = 3  # sources of a kind in an error, at most


def row(item: Item | Rejected, crc: int | None) -> list[Any]:
    """The row by which a change of an item is seen; `crc` if its picture was read."""
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
    """Compare the input's parts with those planned.

    UserError if finished parts (`done`) were made of other files, or if more or fewer
    files are left to do. Returns whether the plan should take the new parts over, as
    only times differ, or files of parts that are not done.
    """
    # Plans of earlier versions have no stamps to compare.
    if not any(part.stamp for part in planned):
        log.warning(
            "%s: planned by an earlier version, so changed inputs are not detected",
            workdir,
        )
        return False
    if {*map(json.dumps, planned)} == {*map(json.dumps, parts)}:
        return False
    by_kind, todo_now, todo_planned = _compare(workdir, planned, parts, done)
    changes = [
        f"{len(names):,} {kind} ({_named(names)})"
        for kind, names in by_kind.items()
        if names
    ]
    extent = lambda part: [part.path, part.label, part.spans]
    if not changes and [*map(extent, planned)] != [*map(extent, parts)]:
        counts = f"{todo_now:,} where {todo_planned:,} were"
        changes = [f"of the files that are not done yet, {counts} planned"]
    if changes:
        raise UserError(
            f"config.ingest.inputs: {', '.join(changes)} since {workdir} was planned:"
            " restore the old files or use another workdir"
        )
    return True


def _compare(
    workdir: epath.Path,
    planned: Sequence[Part],
    parts: Sequence[Part],
    done: set[int],
) -> tuple[dict[str, list[str]], int, int]:
    """Find sources that were added, removed or edited, as opposed to not done yet.

    Returns them by kind, and how many files are left to do now and by the plan.
    Sources come in one order, however they are divided into parts. A source that no
    finished part has, between two that finished parts have, was planned for the part
    between these; if there is no such part, it was added.
    """
    unchanged = {*map(json.dumps, planned)} & {*map(json.dumps, parts)}
    timeless = lambda part: json.dumps(part._replace(stamp=""))
    position_of: dict[str, int] = {}  # in the plan, of whole parts and of sources
    old_rows: dict[str, list] = {}  # of parts that are done, by source
    todo: dict[int, int] = {}  # how many are not done, by position in the plan
    # Rows of finished parts are read only where the part itself is not as it was.
    for number, part in enumerate(planned):
        position = len(position_of)
        if (text := json.dumps(part)) in unchanged:
            position_of[text] = position
        elif number not in done:
            position_of[timeless(part)], todo[position] = position, part.count or 0
        else:
            lines = path(workdir, number).read_text().splitlines()
            rows = {old[0]: old for old in map(json.loads, lines)}
            old_rows |= rows
            position_of |= {source: position + i for i, source in enumerate(rows)}
    added, edited, unplaced, todo_now, last = [], [], [], 0, -1
    gaps = sorted(todo)

    def decide(position: int) -> int:
        """Decide what the sources between the last position and this one are."""
        between = bisect.bisect_left(gaps, position) - bisect.bisect_right(gaps, last)
        if between <= 0:
            added.extend(unplaced)
        count = len(unplaced) if between > 0 else 0
        unplaced.clear()
        return count

    for part in parts:
        position = position_of.get(json.dumps(part), position_of.get(timeless(part)))
        if position is not None:  # unchanged, or touched and not done: not read
            todo_now += decide(position)
            last = position
            todo.pop(position, None)
            continue
        for item in input_parts.items(part):
            if (old := old_rows.pop(item.source, None)) is None:
                unplaced.append(item.source)
                continue
            todo_now += decide(position_of[item.source])
            last = position_of[item.source]
            if change := _change(item, old):
                edited.append(f"{item.source}: {change}")
    todo_now += decide(len(position_of))
    by_kind = {"added": added, "removed": sorted(old_rows), "edited": edited}
    return by_kind, todo_now, sum(todo.values())


def _change(item: Item | Rejected, old: list) -> str:
    """Which part of an item has changed; "" if none has."""
    _, size, time, crc, columns = row(item, None)
    if isinstance(item, Rejected):
        return "" if (size, columns) == (old[1], old[4]) else "the file"
    # Columns first: they are at hand, while the picture may have to be read.
    if columns != old[4]:
        return "its caption or another column"
    if size != old[1]:
        return "the picture"
    # Without a checksum the picture was rejected unread; with the time unchanged it
    # need not be read again. Tars and parquet files have no time for each picture.
    if old[3] is None or (time and time == old[2]):
        return ""
    try:
        return "" if zlib.crc32(item.read()) == old[3] else "the picture"
    except BadItem:
        return "the picture"


def _named(sources: Sequence[str]) -> str:
    ellipsis = ", …" if len(sources) > NAMED else ""
    return ", ".join(shown(source) for source in sources[:NAMED]) + ellipsis
