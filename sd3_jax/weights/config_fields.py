"""Fields of published configurations: their defaults, and the values accepted."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sd3_jax.foreign_text import shown

WIDTH = 2**16  # at most; no published model is near
LEVELS = 8  # of an autoencoder, at most


class Field(NamedTuple):
    """A field's default in its library, and the values that are accepted.

    A `guard` field is only checked: it is not added to a configuration without it.
    """

    default: Any
    allowed: str
    accepts: Callable[[Any], bool]
    guard: bool = False


def or_null(field: Field) -> Field:
    """The field, which may also be null."""
    accepts = lambda x: x is None or field.accepts(x)
    return field._replace(allowed=f"{field.allowed} or null", accepts=accepts)


def count(default: int | None, most: int = WIDTH, *, least: int = 1) -> Field:
    """An integer field."""
    # type(), not isinstance: JSON's true would be an int in Python.
    accepts = lambda x: type(x) is int and least <= x <= most
    return Field(default, f"a whole number from {least} to {most}", accepts)


def real(default: float | None, least: float, most: float) -> Field:
    """A number field."""
    accepts = lambda x: type(x) in (int, float) and least <= x <= most  # NaN is not
    return Field(default, f"a number from {least:g} to {most:g}", accepts)


def flag(default: bool) -> Field:
    """A boolean field."""
    return Field(default, "true or false", lambda x: type(x) is bool)


def counts(default: Sequence[int], most: int, *, least: int, longest: int) -> Field:
    """A field that is a list of at most `longest` integers."""
    words = f"a list of at most {longest} whole numbers from {least} to {most}"
    # Configurations read from JSON have lists; those made in Python may have tuples.
    one = count(None, most, least=least).accepts
    accepts = lambda x: (
        isinstance(x, list | tuple) and len(x) <= longest and all(map(one, x))
    )
    return Field(default, words, accepts)


def only(*values: Any, default: Any = ..., guard: bool = False) -> Field:
    """A field of which only `values` are implemented; the first is the default."""
    # Floats by isclose: files print them with more or fewer digits. Types must agree,
    # because True == 1 == 1.0 in Python.
    words = " or ".join(map(as_json, values)) + ": nothing else is supported"
    alike = lambda x, value: (
        type(x) is type(value)
        and (math.isclose(x, value) if type(x) is float else x == value)
    )
    accepts = lambda x: any(alike(x, value) for value in values)
    default = values[0] if default is ... else default
    return Field(default, words, accepts, guard)


def all_of(value: str) -> Field:
    """A field that is a list of one value repeated."""
    words = f"a list of {value}: nothing else is supported"
    accepts = lambda x: (
        isinstance(x, list | tuple)
        and 0 < len(x) <= LEVELS
        and all(one == value for one in x)
    )
    return Field((value,), words, accepts)


def as_json(value: Any) -> str:
    """A value as JSON, for a message."""
    # default=str: a configuration may also be a dictionary made in Python.
    return shown(json.dumps(value, ensure_ascii=False, default=str))


def free(names: str) -> dict[str, None]:
    """Fields, separated by spaces, on which nothing here depends."""
    return dict.fromkeys(names.split())
