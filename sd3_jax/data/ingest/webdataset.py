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
from sd3_jax.data.ingest.tars import Place

TWICE = "a name that came before"


def items(part: Part) -> Iterator[Item | Rejected]:
    """Yield a tar's samples, and rejected members where they stand.

    All headers are read before the first sample: a caption may lie anywhere in the tar,
    since some tools write all pictures first.
    """
    places, damage = [], None
    try:
        for place in tars.places(part.path):
            if _is_picture(place) and place.key.endswith(LABELS):
                place = place._replace(reason=LABEL)
            # Folders are no files: they are not counted.
            if place.reason != tars.FOLDER:
                places.append(place)
    except tars.BadTar as error:
        damage = str(error).removeprefix(f"{part.path}: ")
    by_key = lambda place: place.key
    # WebDataset's writers put a sample's files next to each other: a run of one key.
    runs = [list(run) for _, run in groupby(_keyed(places), key=by_key)]
    merged = _merged(runs)
    for number, run in enumerate(runs):
        for place in run:
            if place.reason:
                yield _refused(part, place, place.reason)
        if number in merged:
            # Only the last sample can have lost members to the damage.
            cut = damage is not None and number == len(runs) - 1
            yield from _sample(part, merged[number], cut=cut)
    # What came before the damage is used; the damage itself is one rejected entry.
    if damage is not None:
        yield rejected(part.label, f"a damaged tar: {damage}", part.bytes)


def _keyed(places: Sequence[Place]) -> list[Place]:
    """The members under the keys of their samples."""
    by_first_dot = {place.key for place in places if _is_picture(place)}
    keyed = []
    for place in places:
        redotted = tars.by_last_dot(place)
        if redotted and _is_picture(redotted) and place.key not in by_first_dot:
            place = redotted
        keyed.append(place)
    # Then captions, once all pictures have their keys: of a.b.txt to a.b.jpg, and of
    # a.jpg.txt to a.jpg.
    pictured = {place.key for place in keyed if _is_picture(place)}
    owners = {f"{p.key}.{p.extension}": p.key for p in keyed if _is_picture(p)}
    for i, place in enumerate(keyed):
        redotted = tars.by_last_dot(place)
        if redotted and not _is_picture(redotted):
            stem, dot, extension = redotted.key.rpartition(".")
            owner = owners.get(f"{stem}{dot}{extension.lower()}", redotted.key)
            if owner in pictured:
                keyed[i] = redotted._replace(key=owner)
    return keyed


def _merged(runs: list[list[Place]]) -> dict[int, dict[str, Place]]:
    """Samples as members by extension, under the number of the run with the picture.

    Consecutive members with one key are a run. A run without a picture adds its
    captions to the run of that key that has one. A second picture of a key belongs to
    another sample, whose captions are not mixed with the first's. Members that are left
    over get their reason in `runs`.
    """
    samples, place_of = {}, {}
    for number, run in enumerate(runs):
        sample = {}
        for i, place in enumerate(run):
            if place.reason:
                continue
            if place.extension in sample:
                run[i] = place._replace(reason=TWICE)
            elif place.extension in PICTURES and _picture(sample):
                run[i] = place._replace(reason="another picture of its sample")
            else:
                sample[place.extension] = place
        if sample:
            samples[number] = sample
            key = run[0].key
            # The first run with a picture has the key; before one comes, the first of
            # all.
            if key not in place_of or (
                _picture(sample) and not _picture(samples[place_of[key]])
            ):
                place_of[key] = number
    # Only now is it known which run of each key has a picture.
    for number, sample in list(samples.items()):
        first = place_of[runs[number][0].key]
        if number == first:
            continue
        target = samples[first]
        for extension, place in samples.pop(number).items():
            if _picture(sample) or extension in target:
                at = runs[number].index(place)
                runs[number][at] = place._replace(reason=TWICE)
            else:
                # A caption of a run without a picture, as when all pictures come first.
                target[extension] = place
    return samples


def _sample(part: Part, sample: dict[str, Place], *, cut: bool) -> Iterator:
    """The item of a sample, or its rejected members.

    At the end of a truncated tar a picture without captions is rejected: its caption
    may have been cut off.
    """
    picture = _picture(sample)
    sidecars = [sample[kind] for kind in SIDECARS if kind in sample]
    if not picture:
        for place in sidecars:
            yield _refused(part, place, "a caption without a picture")
        return
    if cut and not sidecars:
        yield _refused(part, picture, "its tar is cut off after it")
        return
    try:
        columns = {}
        for place in sidecars:
            location = (part.path, place.extension, place.start, place.size)
            columns = merge(columns, read_columns(*location))
    except BadItem as error:
        yield _refused(part, picture, error)
        return
    read = partial(read_at, part.path, picture.start, picture.size)
    yield checked_item(f"{part.label}:{picture.key}", columns, read, picture.size)


def _is_picture(place: Place) -> bool:
    return not place.reason and place.extension in PICTURES


def _picture(sample: dict[str, Place]) -> Place | None:
    return next((sample[kind] for kind in sample if kind in PICTURES), None)


def _refused(part: Part, place: Place, reason: object) -> Rejected:
    return rejected(f"{part.label}:{place.name}", reason, place.size)
