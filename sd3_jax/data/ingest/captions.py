"""Drawing a record's caption among those of its picture: by weight, once, by source.

The SD3 paper mixes original and synthetic captions in equal parts (sec. 4.2).
"""

import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import hooks
from sd3_jax.data import records
from sd3_jax.data.ingest.items import BadItem, Numeral, Value, call_function, uniform
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

USUAL = ("caption", "text", "txt", "prompt", "captions")  # that "caption" stands for
# Columns of the default mixture. An input may lack them without it being a mistake.
STANDING = ("caption", "synthetic")
WANTED = '"caption=0.5", "column=0.5" or "package.module:function=0.5"'


class Caption(NamedTuple):
    name: str  # a column, "caption", or a function
    weight: float
    function: Callable | None = None  # (picture (h, w, 3) in uint8, columns) → text


class Drawn(NamedTuple):
    text: str  # "" if the item has none
    name: str  # of the caption that was drawn, "" if none


def parse(specs: Sequence[str]) -> tuple[Caption, ...]:
    """Parse captions from specs, "name=weight" or "name"; or a UserError."""
    by_name = {}
    for spec in specs:
        name, equals, weight = spec.rpartition("=")
        name, weight = (name, weight) if equals else (spec, "1")
        name = name.strip()
        if not name or not _positive(weight):
            raise UserError(
                f"{shown(spec) or '(nothing)'}: not a caption; expected {WANTED}"
            )
        if name in by_name:
            raise UserError(f"{shown(spec)}: the caption {shown(name)} is listed twice")
        # A colon tells a function from a column: "package.module:function".
        function = hooks.load(name) if ":" in name else None
        by_name[name] = Caption(name, float(weight), function)
    return tuple(by_name.values())


def draw(
    item_columns: Mapping[str, Value],
    captions: Sequence[Caption],
    *,
    seed: int,
    source: str,
    picture: UInt8[ndarray, "h w 3"] | None = None,
) -> Drawn:
    """Draw one of the captions that the item has, or that a function gives.

    Depends only on seed and source: the same on every host and in every run. In a
    column with a list of captions each is equally likely. Values that are not text, or
    empty once cleaned, do not count. BadItem if a function is drawn and fails.
    """
    texts_of = [(caption, _texts(item_columns, caption.name)) for caption in captions]
    choices = [row for row in texts_of if row[0].function or row[1]]
    if not choices:
        return Drawn("", "")
    caption_draw, text_draw = uniform(seed, source, purpose=b"caption", count=2)
    ends = list(accumulate(caption.weight for caption, _ in choices))
    chosen = bisect(ends, caption_draw * ends[-1])
    # Rounding may leave the draw at the last end, which bisect puts past the last.
    caption, texts = choices[min(chosen, len(choices) - 1)]
    if not caption.function:
        several = " (one of several)" if len(texts) > 1 else ""
        return Drawn(texts[int(text_draw * len(texts))], caption.name + several)
    answer = call_function(caption.function, caption.name, picture, item_columns)
    if not isinstance(answer, str):
        raise BadItem(
            f"{caption.name} returned no text: {shown(type(answer).__name__)}"
        )
    try:
        text = records.clean(answer)
    except ValueError as error:
        raise BadItem(f"{caption.name} returned no text: {error}") from None
    return Drawn(text, caption.name if text else "")


def prefixed(drawn: Drawn, prefix: str) -> Drawn:
    """The caption after the prefix of all captions; the prefix alone without one."""
    if not prefix:
        return drawn
    if not drawn.text:
        return Drawn(records.clean(prefix.rstrip(" ,")), "prefix")
    return Drawn(records.clean(f"{prefix.rstrip(' ')} {drawn.text}"), drawn.name)


def available(columns: Mapping[str, Value], captions: Sequence[Caption]) -> list[str]:
    """Names of the captions that the item has as columns."""
    from_columns = [caption for caption in captions if not caption.function]
    return [caption.name for caption in from_columns if _texts(columns, caption.name)]


def _texts(columns: Mapping[str, Value], name: str) -> list[str]:
    """A column's captions, cleaned; for "caption" those of the first usual column that
    has any, in whatever case its name is."""
    names = (name,)
    if name == "caption":
        # Column names are matched in any case, the exact one first.
        spelt = lambda usual: sorted(x for x in columns if x.lower() == usual)
        names = [x for usual in USUAL for x in (usual, *spelt(usual))]
    for column in names:
        value = columns.get(column)
        texts = map(_text, value if isinstance(value, list) else [value])
        if filled := [text for text in texts if text]:
            return filled
    return []


def _text(value: Value) -> str:
    value = value.text if isinstance(value, Numeral) else value
    try:
        return records.clean(value) if isinstance(value, str) else ""
    except ValueError:  # half of a surrogate pair, from a broken file
        return ""


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
