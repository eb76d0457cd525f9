"""A key of the config: its default, the rule for its values, a sentence about it."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from sd3_jax.sampling.images import watermark


class Rule(NamedTuple):
    """What a value must be; `wanted` completes "expected …" in errors and in help."""

    holds: Callable[[Any], bool]  # nan is in no range
    wanted: str
    choices: tuple[str, ...] = ()


class Key(NamedTuple):
    """A default of None is unset: jobs derive the value, which is of `kind`."""

    default: Any
    rule: Rule
    about: str
    kind: type | None = None


def integer(low: int, high: int, also: tuple[int, ...] = ()) -> Rule:
    is_int = lambda x: isinstance(x, int) and not isinstance(x, bool)
    other = "".join(f" or {x}" for x in also)
    return Rule(
        lambda x: is_int(x) and (low <= x <= high or x in also),
        f"an integer in [{low}, {high}]{other}",
    )


def number(wanted: str, holds: Callable) -> Rule:
    is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
    return Rule(lambda x: is_number(x) and holds(x), wanted)


def above_zero(high: float) -> Rule:
    return number(f"a number in (0, {high:g}]", lambda x: 0 < x <= high)


def between(low: float, high: float) -> Rule:
    return number(f"a number in [{low:g}, {high:g}]", lambda x: low <= x <= high)


def one_of(*choices: str | int) -> Rule:
    names = ", ".join(map(str, choices)).lstrip(", ")
    # isinstance, because True == 1 and 2.0 == 2.
    is_one = lambda x: any(isinstance(x, type(c)) and x == c for c in choices)
    return Rule(is_one, f"one of {names}", tuple(map(str, choices)))


def sequence(rule: Rule, wanted: str, holds: Callable = lambda x: True) -> Rule:
    """A tuple or list, each item of which keeps the rule."""
    is_one = lambda x: isinstance(x, tuple | list)
    keeps = lambda x: is_one(x) and all(map(rule.holds, x)) and holds(x)
    return Rule(keeps, wanted, rule.choices)


def some_of(*names: str, also: str = "") -> Rule:
    return sequence(one_of(*names), f"some of {', '.join(names)}{also}")


def is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def is_utf8(text: Any) -> bool:
    """A text without halves of surrogate pairs.

    They stand for bytes of other encodings on a command line, and no record, log or
    page can hold them.
    """
    return isinstance(text, str) and not re.search("[\ud800-\udfff]", text)


# Neither checks anything: a ConfigDict keeps the type, and jobs check what it names.
SWITCH = Rule(lambda x: True, "true or false")
FREE = Rule(lambda x: True, "any text")

# Every key has an upper bound: far above any use, and below what overflows 32 bits, a
# float32 or a C library's argument after minutes of compiling.
INT32 = 2**31 - 1
POSITIVE = integer(1, INT32)
COUNT = integer(0, INT32)
DEPTH = integer(1, 1_000)
WIDTH = integer(1, 2**16)  # of a layer, and of a picture in pixels
FEW = integer(1, 1_024)  # heads, channels, threads
BATCH = integer(1, 2**20)
SEED = integer(0, 2**32 - 1)  # jax keeps 32 bits and drops the rest in silence
TURNS = integer(1, 10_000)  # steps of a solver, repeats
RATE = above_zero(100)
WEIGHT = between(0, 1e9)
POSITIVE_FACTOR = above_zero(1e9)
BELOW_ONE = number("a number in [0, 1)", lambda x: 0 <= x < 1)
UNIT = number("a number in [0, 1]", lambda x: 0 <= x <= 1)
LAYERS = sequence(integer(0, 999), "layers by number, 0 being the first")
NAME = Rule(lambda x: isinstance(x, str) and bool(x.strip()), "a name")
TEXT = Rule(is_utf8, "a text in UTF-8")
TEXTS = sequence(TEXT, "texts in UTF-8, with commas between")
SOME_TEXTS = sequence(
    TEXT, "one text in UTF-8 or more, with commas between", lambda x: len(x) > 0
)
SHARDS = sequence(NAME, "paths of shards, or globs of them")
PATHS = sequence(NAME, "paths, or globs of them")
DTYPE = one_of("float32", "bfloat16")
DTYPE_OR_HALF = one_of("float32", "bfloat16", "float16")
HOOK = Rule(
    lambda x: is_utf8(x) and (not x or ":" in x),
    '"package.module:function", or nothing',
)
REGEX = Rule(lambda x: is_utf8(x) and is_regex(x), "a regular expression")
WATERMARK = Rule(
    lambda x: isinstance(x, str) and (not x or watermark.fits(x)),
    f"at most {watermark.LENGTH} bytes of text that prints",
)
