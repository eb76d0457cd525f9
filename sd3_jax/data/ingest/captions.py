"""Which of a picture's captions a record has: drawn by weight, for good, by its source.

The paper's mix is half the original's, half synthetic ones (sec. 4.2).
"""

import hashlib
import json
import math
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import hooks
from sd3_jax.data import records
from sd3_jax.data.ingest.items import BadItem, Numeral, Value, call_function
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

USUAL = ("caption", "text", "txt", "prompt", "captions")  # what "caption" stands for
STANDING = ("caption", "synthetic")  # the default's: not every input has each of them
WANTED = '"caption=0.5", "column=0.5" or "package.module:function=0.5"'


class Caption(NamedTuple):
    name: str  # a column, "caption", or a function
    weight: float
    function: Callable | None = None  # (picture (h, w, 3) in uint8, columns) → text


class Drawn(NamedTuple):
    text: str  # "" if the item has none
    name: str  # which of the captions it is, "" if none


def parse(specs: Sequence[str]) -> tuple[Caption, ...]:
    """Captions from their specs, "name=weight" or "name"; or a UserError."""
    by_name = {}
    for spec in specs:
        name, equals, weight = spec.rpartition("=")
        name, weight = (name, weight) if equals else (spec, "1")
        name = name.strip()
        if not name or not _positive(weight):
            raise UserError(
                f"{shown(spec) or '(nothing)'}: no caption; wanted {WANTED}"
            )
        if name in by_name:
            raise UserError(f"{shown(spec)}: the caption {shown(name)} is listed twice")
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
    """One of the captions that the item has, a function's among them.

    A function of seed and source: the same on every host, and when it is done again.
    Of a column that lists several, each is as likely. What is no text, or empty once it
    is cleaned, is none. BadItem if a function was drawn and fails.
    """
    texts_of = [(caption, _texts(item_columns, caption.name)) for caption in captions]
    choices = [row for row in texts_of if row[0].function or row[1]]
    if not choices:
        return Drawn("", "")
    caption_draw, text_draw = _uniform(seed, source)
    ends = list(accumulate(caption.weight for caption, _ in choices))
    chosen = bisect(ends, caption_draw * ends[-1])
    # Rounding may leave the draw at the last end, which bisect puts past the last.
    caption, texts = choices[min(chosen, len(choices) - 1)]
    if not caption.function:
        several = " (one of several)" if len(texts) > 1 else ""
        return Drawn(texts[int(text_draw * len(texts))], caption.name + several)
    answer = call_function(caption.function, caption.name, picture, item_columns)
    if not isinstance(answer, str):
        raise BadItem(f"{caption.name} gave no text: {shown(type(answer).__name__)}")
    try:
        text = records.clean(answer)
    except ValueError as error:
        raise BadItem(f"{caption.name} gave no text: {error}") from None
    return Drawn(text, caption.name if text else "")


def prefixed(drawn: Drawn, prefix: str) -> Drawn:
    """The caption behind the text that all have in common; without one, that text."""
    if not prefix:
        return drawn
    if not drawn.text:
        return Drawn(records.clean(prefix.rstrip(" ,")), "prefix")
    return Drawn(records.clean(f"{prefix.rstrip(' ')} {drawn.text}"), drawn.name)


def available(columns: Mapping[str, Value], captions: Sequence[Caption]) -> list[str]:
    """Which of the captions that are columns the item has."""
    from_columns = [caption for caption in captions if not caption.function]
    return [caption.name for caption in from_columns if _texts(columns, caption.name)]


def _texts(columns: Mapping[str, Value], name: str) -> list[str]:
    """A column's captions, cleaned; of the usual ones, however their letters are cased,
    the first that has any."""
    names = (name,)
    if name == "caption":
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
    except ValueError:  # half of a surrogate pair: it came of a broken file
        return ""


def _uniform(seed: int, source: str) -> tuple[float, float]:
    """Two numbers in [0, 1), independent of each other."""
    data = json.dumps([seed, source]).encode()  # ASCII, whatever the source is
    digest = hashlib.blake2b(data, digest_size=16, person=b"caption").digest()
    high, low = digest[:8], digest[8:]
    return tuple((int.from_bytes(half) >> 11) / 2**53 for half in (high, low))


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
