"""Self-contained HTML pages: templates/*.html, filled with text that is escaped."""

import base64
import io
import math
import re
from typing import Any, NamedTuple

import jinja2
from PIL import Image

from sd3_jax.data.images import open_header, pixels
from sd3_jax.foreign_text import shown
from sd3_jax.reports import number_format

# What HTML and UTF-8 cannot hold, and marks that turn the text after them round.
UNFIT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("sd3_jax.reports"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a misspelled name is an error, not a gap
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {
    "shown": shown,
    "thousands": "{:,}".format,
    "plural": number_format.plural,
}


class Picture(NamedTuple):
    """A picture inside the page; width and height are in pixels."""

    source: str  # a data URI
    alt: str
    width: int
    height: int


class Panel(NamedTuple):
    """A plot under its title; without a plot the caption says why."""

    title: str
    svg: str
    caption: str


class Bar(NamedTuple):
    """A filled part of a track and a mark on it, in shares of the track's width."""

    left: float
    width: float
    mark: float | None = None


def render(template: str, **values: Any) -> str:
    """The page of a template's file name; every text of `values` is escaped in it."""
    return UNFIT.sub("\ufffd", TEMPLATES.get_template(template).render(values))


def bar(score: float, low: float | None, high: float | None) -> Bar | None:
    """Where a score in [0, 1] stands, and its interval; None for other scores."""
    low, high = (score if end is None else end for end in (low, high))
    inside = 0 <= low <= score <= high <= 1  # False also for NaN
    return Bar(low, high - low, score) if inside else None


def picture(data: bytes, alt: str, *, limit: int) -> Picture:
    """The picture in a file's bytes, made smaller if these are more than `limit`.

    Raises BadImage if it cannot be decoded.
    """
    header = open_header(data, alt)
    rgb, kind = pixels(header, alt), header.format.lower()
    if len(data) > limit:
        data, kind = _shrink(Image.fromarray(rgb), limit), "webp"
    height, width = rgb.shape[:2]
    # Inside the page, so that a report is a single file.
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri, alt, width, height)


def _shrink(picture, limit):
    side = max(picture.size)
    while True:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "webp", quality=88)
        if buffer.tell() <= limit or side <= 256:
            return buffer.getvalue()
        # Bytes go with the area, so sides go with the root of what is too much.
        side = int(side * max(0.5, min(0.9, math.sqrt(limit / buffer.tell()))))
