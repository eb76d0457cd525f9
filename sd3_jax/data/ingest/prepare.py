"""Prepare an item for encoding: filter, decode, crop to its bucket, draw its caption.

The result depends only on the item and the settings, not on the host or the run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from etils import epath
from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax.data import buckets, images
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.ingest import captions, filters
from sd3_jax.data.ingest.captions import Caption
from sd3_jax.data.ingest.filters import Filter
from sd3_jax.data.ingest.items import (
    BadItem,
    Item,
    Rejected,
    read_at,
    rejected,
    uniform,
)
from sd3_jax.errors import UserError

UNCAPTIONED = "no caption"


class Settings(NamedTuple):
    """Which items are taken, and how they are prepared."""

    buckets: Sequence[Bucket]
    captions: Sequence[Caption]
    filters: Sequence[Filter] = ()
    excluded: Mapping[str, str] = {}  # sources, and why
    prefix: str = ""  # before every caption, and the caption of what has none
    uncaptioned: bool = False  # whether items without a caption are taken
    held_out: float = 0.0  # share that is for validation
    rejected: str = ""  # the column that names a preference's other picture
    folder: str = ""  # that the names in that column are relative to
    seed: int = 0


class Ready(NamedTuple):
    """A picture in its bucket's shape, with the other fields of its record."""

    source: str
    image: UInt8[ndarray, "h w 3"]
    bucket: Bucket
    caption: str
    caption_from: str
    size: tuple[int, int]
    crop: tuple[int, int, int, int]
    held_out: bool
    bytes: int  # of its file
    rejected: UInt8[ndarray, "h w 3"] | None = None  # in the same shape


def prepare(item: Item | Rejected, settings: Settings) -> Ready | Rejected:
    """Prepare an item, or reject it with a reason.

    Filters and functions also see the columns height and width in pixels, `enlarged`,
    the factor by which the bucket enlarges the picture, and `kept`, the share of the
    picture that is not cropped off.
    """
    if isinstance(item, Rejected):
        return item
    refuse = lambda reason: rejected(item.source, reason, item.bytes)
    if item.source in settings.excluded:
        return refuse(f"excluded: {settings.excluded[item.source]}")
    of_columns, of_pictures = filters.split(settings.filters)
    known_columns = {"height", "width", "enlarged", "kept"}
    early_filters = [rule for rule in of_columns if rule.name not in known_columns]
    # Cheapest first: filters on the input's columns reject before the picture is read.
    try:
        if refusal := filters.refuse(early_filters, item.columns):
            return refuse(_filtered(refusal))
        picture = images.read(item.read())
        height, width = size = picture.shape[:2]
        fit = buckets.fit(height, width, settings.buckets)
        columns = dict(item.columns, height=height, width=width)
        columns |= dict(enlarged=fit.enlarged, kept=fit.kept)
        late_filters = [rule for rule in of_columns if rule.name in known_columns]
        if refusal := filters.refuse([*late_filters, *of_pictures], columns, picture):
            return refuse(_filtered(refusal))
        rejected_picture = rejected_picture_of(item, settings, fit.bucket)
        drawn = captions.draw(
            columns,
            settings.captions,
            seed=settings.seed,
            source=item.source,
            picture=picture,
        )
        drawn = captions.prefixed(drawn, settings.prefix)
    except images.BadImage as error:
        fault = fault_kind(error).replace(": ", ", ")
        return refuse(f"bad picture, {fault}: {str(error).removeprefix('image: ')}")
    except BadItem as error:
        return refuse(str(error))
    if not (drawn.text or settings.uncaptioned):
        return refuse(UNCAPTIONED)
    (draw,) = uniform(settings.seed, item.source, purpose=b"held out", count=1)
    held_out = draw < settings.held_out
    cropped = buckets.cut(picture, fit)
    text = drawn.text, drawn.name
    placement = size, fit.crop, held_out, item.bytes
    return Ready(item.source, cropped, fit.bucket, *text, *placement, rejected_picture)


def rejected_picture_of(
    item: Item, settings: Settings, bucket: Bucket
) -> UInt8[ndarray, "h w 3"] | None:
    """The worse picture of a preference, cut to the bucket of the better one."""
    if not settings.rejected:
        return None
    name = item.columns.get(settings.rejected)
    if not isinstance(name, str) or not name.strip():
        raise BadItem(f'has no "{settings.rejected}", the rejected picture')
    # Written on Windows, as a file_name in metadata may be.
    name = name.replace("\\", "/")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise BadItem(f'bad "{settings.rejected}": outside the folder')
    path = epath.Path(settings.folder) / name
    try:
        picture = images.read(read_at(str(path)))
    except (images.BadImage, BadItem) as error:
        reason = str(error).removeprefix("image: ")
        raise BadItem(f'bad "{settings.rejected}": {reason}') from None
    return buckets.cut(picture, buckets.fit(*picture.shape[:2], [bucket]))


def parse_exclusions(lines: Sequence[str], where: str) -> dict[str, str]:
    """Parse dedup's duplicates.jsonl: source → why it is excluded; or a UserError."""
    exclusions = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            exclusions[row["source"]] = f"near-duplicate of {row['kept']}"
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f'{where}, line {number}: expected {{"source": …, "kept": …}}, as'
                " sd3-jax dedup writes it"
            ) from None
    return exclusions


def reason_kind(reason: str) -> str:
    """The part of a reason that it shares with others: all before its first colon."""
    return reason.partition(": ")[0]


def fault_kind(error: UserError) -> str:
    """A picture's fault without its place and numbers, for counting."""
    fault, _, _ = str(error).removeprefix("image: ").partition("; expected")
    return re.sub(r"\d+", "N", fault)


def _filtered(refusal: filters.Refusal) -> str:
    return f"filter {refusal.spec}: {refusal.reason}"
