"""Which items are kept: bounds on their columns, or on what a function says of them."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import hooks
from sd3_jax.data.ingest.items import BadItem, Value, asked
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

PASSES = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
SPEC = re.compile(r"\s*([^<>=]*[^<>=\s])\s*(>=|<=|>|<)\s*([^<>=\s]+)\s*")
WANTED = '"aesthetic>=4.5" or "package.module:function<0.2"; of >=, <=, > and <'


class Filter(NamedTuple):
    spec: str
    name: str  # a column, or a function
    op: str
    bound: float
    function: Callable | None = None  # (picture (h, w, 3) in uint8, columns) → number


class Refusal(NamedTuple):
    spec: str  # of the filter: many have it in common
    reason: str


def parse(specs: Sequence[str]) -> tuple[Filter, ...]:
    """Filters from their specs, in that order; or a UserError."""
    return tuple(map(_parse, specs))


def split(
    filters: Sequence[Filter],
) -> tuple[tuple[Filter, ...], tuple[Filter, ...]]:
    """Those on columns, which cost nothing, and those that look at the picture."""
    on_columns = tuple(each for each in filters if not each.function)
    return on_columns, tuple(each for each in filters if each.function)


def refuse(
    filters: Sequence[Filter],
    columns: Mapping[str, Value],
    picture: UInt8[ndarray, "h w 3"] | None = None,
) -> Refusal | None:
    """Why the item is not kept: the first filter it does not pass; None if it is kept.

    BadItem if a function fails, or gives no number.
    """
    for each in filters:
        value = _value(each, columns, picture)
        if value is None:
            return Refusal(each.spec, f"no {each.name}")
        if not PASSES[each.op](value, each.bound):
            wanted = f"wanted {each.op} {each.bound:.15g}"
            return Refusal(each.spec, f"{each.name} {_shown(each, value)}, {wanted}")
    return None


def _parse(spec: str) -> Filter:
    match = SPEC.fullmatch(spec)
    bound = _finite(match[3]) if match else None
    if bound is None:
        raise UserError(f"{shown(spec) or '(nothing)'}: no filter; wanted {WANTED}")
    name = match[1]
    function = hooks.load(name) if ":" in name else None
    return Filter("".join(match.groups()), name, match[2], bound, function)


def _value(each: Filter, columns, picture) -> float | None:
    """A finite number, or None: a text is none, whatever it spells."""
    if not each.function:
        value = columns.get(each.name)
        return _finite(value) if isinstance(value, int | float) else None
    made = asked(each.function, each.name, picture, columns)
    try:
        return _finite(float(made))  # an array of one number too
    except Exception:
        kind = shown(type(made).__name__)
        raise BadItem(f"{each.name} gave no number: {kind}") from None


def _finite(value: str | int | float) -> float | None:
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _shown(each: Filter, value: float) -> str:
    """Short, but never so that it reads as passing: 4.4999999 is not 4.5."""
    short = f"{value:g}"
    return repr(value) if PASSES[each.op](float(short), each.bound) else short
