"""Filters: bounds on an item's columns, or on what a user's function gives for it."""

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax import hooks
from sd3_jax.data.ingest.items import BadItem, Value, call_function
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
    spec: str  # of the filter, by which rejected items are counted
    reason: str


def parse(specs: Sequence[str]) -> tuple[Filter, ...]:
    """Parse filters from their specs, in order; or a UserError."""
    return tuple(map(_parse, specs))


def split(filters: Sequence[Filter]) -> tuple[tuple[Filter, ...], tuple[Filter, ...]]:
    """(filters on columns, which cost nothing; functions, which need the picture)."""
    on_columns = tuple(rule for rule in filters if not rule.function)
    return on_columns, tuple(rule for rule in filters if rule.function)


def refuse(
    filters: Sequence[Filter],
    columns: Mapping[str, Value],
    picture: UInt8[ndarray, "h w 3"] | None = None,
) -> Refusal | None:
    """The first filter that the item does not pass, or None if it passes all.

    BadItem if a function fails or does not give a number.
    """
    for rule in filters:
        value = _value(rule, columns, picture)
        # An item without the column is rejected: nothing says that it would pass.
        if value is None:
            return Refusal(rule.spec, f"no {rule.name}")
        if not PASSES[rule.op](value, rule.bound):
            bound = f"expected {rule.op} {rule.bound:.15g}"
            return Refusal(rule.spec, f"{rule.name} {_shown(rule, value)}, {bound}")
    return None


def _parse(spec: str) -> Filter:
    match = SPEC.fullmatch(spec)
    bound = _finite(match[3]) if match else None
    if bound is None:
        raise UserError(
            f"{shown(spec) or '(nothing)'}: not a filter; expected {WANTED}"
        )
    # A colon tells a function from a column: "package.module:function".
    name = match[1]
    function = hooks.load(name) if ":" in name else None
    return Filter("".join(match.groups()), name, match[2], bound, function)


def _value(rule: Filter, columns, picture) -> float | None:
    """A finite number or None. A text is not a number, whatever it spells."""
    if not rule.function:
        # A boolean is an int to Python, and counts as 0 or 1: "nsfw<1".
        value = columns.get(rule.name)
        return _finite(value) if isinstance(value, int | float) else None
    answer = call_function(rule.function, rule.name, picture, columns)
    try:
        return _finite(float(answer))  # an array of one number too
    except Exception:
        kind = shown(type(answer).__name__)
        raise BadItem(f"{rule.name} returned no number: {kind}") from None


def _finite(value: str | int | float) -> float | None:
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _shown(rule: Filter, value: float) -> str:
    """The value, short unless rounding makes it pass: 4.4999999 is not 4.5."""
    short = f"{value:g}"
    return repr(value) if PASSES[rule.op](float(short), rule.bound) else short
