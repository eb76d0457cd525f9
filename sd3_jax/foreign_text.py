"""Untrusted input: strict JSON, and text that is safe in a message."""

import json
import math
from collections.abc import Iterable
from typing import Any

LISTED = 10  # names in a message, at most


def parse_json(text: str | bytes, *, null_nonfinite: bool = False) -> Any:
    """json.loads that also rejects duplicate names, NaN, infinity and deep nesting.

    With `null_nonfinite`, NaN and infinity become None: pandas and numpy write them for
    missing values. Raises ValueError.
    """

    def number(text: str) -> float | None:
        value = float(text)  # 1e999 is infinite; json also reads NaN and Infinity
        if math.isfinite(value):
            return value
        if null_nonfinite:
            return None
        fault = "is too large" if text[-1].isdigit() else "is not JSON"
        raise ValueError(f"{shown(text)} {fault}")

    # utf-8-sig: some Windows editors write a byte-order mark.
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    hooks = {"parse_float": number, "parse_constant": number}
    try:
        return json.loads(text, object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def shown(value: Any, most: int = 80) -> str:
    """A value as text on one line, of at most `most` characters."""
    # What does not print is escaped, and marks that reverse the line's direction.
    text = str(value)
    ends = "…" if len(text) > most else ""
    return "".join(map(_printed, text[:most])) + ends


def listed(names: Iterable[Any], between: str = ", ") -> str:
    """The first ten names, and how many more there are, for a message."""
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return between.join(shown(name, 300) for name in names[:LISTED]) + more


def _printed(c: str) -> str:
    return c if c.isprintable() else c.encode("unicode_escape").decode()


def _unique(pairs: list) -> dict:
    values = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f'"{shown(name)}" appears twice')
        values[name] = value
    return values
