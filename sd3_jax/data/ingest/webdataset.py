"""Samples of a WebDataset tar: pictures and the captions that share their key.

As in WebDataset, a key ends at the first dot of a member's name: 0001.seg.png is a
second file of the sample 0001. If no picture has that key, names contain dots, such as
22.00.png beside 22.00.txt, and the key ends at the last dot.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

from sd3_jax.data.ingest import tars
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
from sd3_jax.data.ingest.tars import Member

TWICE = "a duplicate name"


def items(part: Part) -> Iterator[Item | Rejected]:
    """Yield a tar's samples, and rejected members where they stand.

    All headers are read before the first sample: a caption may lie anywhere in the tar,
    since some tools write all pictures first.
    """
    members, damage = [], None
    try:
        for member in tars.members(part.path):
            if _is_picture(member) and member.key.endswith(LABELS):
                member = member._replace(reason=LABEL)
            # Folders are no files: they are not counted.
            if member.reason != tars.FOLDER:
                members.append(member)
    except tars.BadTar as error:
        damage = str(error).removeprefix(f"{part.path}: ")
    by_key = lambda member: member.key
    # WebDataset's writers put a sample's files next to each other: a run of one key.
    runs = [list(run) for _, run in groupby(_keyed(members), key=by_key)]
    merged = _merged(runs)
    for number, run in enumerate(runs):
        for member in run:
            if member.reason:
                yield _refused(part, member, member.reason)
        if number in merged:
            # Of the last run members may be lost; the others are followed by more.
            cut = damage is not None and number == len(runs) - 1
            yield from _sample(part, merged[number], cut=cut)
    # What came before the damage is used; the damage itself is one rejected entry.
    if damage is not None:
        yield rejected(part.label, f"a damaged tar: {damage}", part.bytes)


def _keyed(members: Sequence[Member]) -> list[Member]:
    """The members under the keys of their samples."""
    by_first_dot = {member.key for member in members if _is_picture(member)}
    keyed = []
    for member in members:
        redotted = tars.by_last_dot(member)
        if redotted and _is_picture(redotted) and member.key not in by_first_dot:
            member = redotted
        keyed.append(member)
    # Then captions, once all pictures have their keys: of a.b.txt to a.b.jpg, and of
    # a.jpg.txt to a.jpg.
    pictured = {member.key for member in keyed if _is_picture(member)}
    owners = {f"{p.key}.{p.extension}": p.key for p in keyed if _is_picture(p)}
    for i, member in enumerate(keyed):
        redotted = tars.by_last_dot(member)
        if redotted and not _is_picture(redotted):
            stem, dot, extension = redotted.key.rpartition(".")
            owner = owners.get(f"{stem}{dot}{extension.lower()}", redotted.key)
            if owner in pictured:
                keyed[i] = redotted._replace(key=owner)
    return keyed


def _merged(runs: list[list[Member]]) -> dict[int, dict[str, Member]]:
    """Samples as members by extension, under the number of the run with the picture.

    Consecutive members with one key are a run. A run without a picture adds its
    captions to the run of that key that has one. A second picture of a key belongs to
    another sample, whose captions are not mixed with the first's. Members that are left
    over get their reason in `runs`.
    """
    samples, run_of_key = {}, {}
    for number, run in enumerate(runs):
        sample = {}
        for i, member in enumerate(run):
            if member.reason:
                continue
            if member.extension in sample:
                run[i] = member._replace(reason=TWICE)
            elif member.extension in PICTURES and _picture(sample):
                run[i] = member._replace(reason="another picture of its sample")
            else:
                sample[member.extension] = member
        if sample:
            samples[number] = sample
            key = run[0].key
            # The key's first run with a picture, or its first run until one comes.
            if key not in run_of_key or (
                _picture(sample) and not _picture(samples[run_of_key[key]])
            ):
                run_of_key[key] = number
    # Only now is it known which run of each key has a picture.
    for number, sample in list(samples.items()):
        first = run_of_key[runs[number][0].key]
        if number == first:
            continue
        target = samples[first]
        for extension, member in samples.pop(number).items():
            if _picture(sample) or extension in target:
                at = runs[number].index(member)
                runs[number][at] = member._replace(reason=TWICE)
            else:
                # A caption of a run without a picture, as when all pictures come first.
                target[extension] = member
    return samples


def _sample(part: Part, sample: dict[str, Member], *, cut: bool) -> Iterator:
    """The item of a sample, or its rejected members.

    At the end of a truncated tar a picture without captions is rejected: its caption
    may have been cut off.
    """
    picture = _picture(sample)
    sidecars = [sample[kind] for kind in SIDECARS if kind in sample]
    if not picture:
        for member in sidecars:
            yield _refused(part, member, "a caption without a picture")
        return
    if cut and not sidecars:
        yield _refused(part, picture, "its tar is cut off after it")
        return
    try:
        columns = {}
        for member in sidecars:
            location = (part.path, member.extension, member.start, member.size)
            columns = merge(columns, read_columns(*location))
    except BadItem as error:
        yield _refused(part, picture, error)
        return
    read = partial(read_at, part.path, picture.start, picture.size)
    yield checked_item(f"{part.label}:{picture.key}", columns, read, picture.size)


def _is_picture(member: Member) -> bool:
    return not member.reason and member.extension in PICTURES


def _picture(sample: dict[str, Member]) -> Member | None:
    return next((sample[kind] for kind in sample if kind in PICTURES), None)


def _refused(part: Part, member: Member, reason: object) -> Rejected:
    return rejected(f"{part.label}:{member.name}", reason, member.size)
