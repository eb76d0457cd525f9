"""One interface for scorers of digits, objects, text and the user's measures.

A scorer is f(asked, images u8 (n, h, w, 3)) -> n verdicts: whether picture i shows what
asked[i] says.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown


class Asked(NamedTuple):
    """A prompt, its category, and what its scorer expects in the picture."""

    prompt: str
    category: str
    wanted: Any = None


class Verdict(NamedTuple):
    """A picture's value, 1 for right and 0 for wrong, the reason, and other figures."""

    value: float
    reason: str = ""
    others: Mapping[str, float] = {}


Scorer = Callable[[Sequence[Asked], np.ndarray], list[Verdict]]


class Score(NamedTuple):
    """The share of n pictures that are right, and its 95 % interval."""

    name: str
    score: float
    n: int
    low: float
    high: float

    def finite(self) -> dict:
        """The row of scores.json, without infinite bounds, which JSON lacks."""
        # Of a single picture the interval has no end; a page shows it without one.
        fields = self._asdict().items()
        return {k: x for k, x in fields if isinstance(x, str) or np.isfinite(x)}


def score(name: str, right: Sequence[bool]) -> Score:
    """The share of right pictures, with Wilson's interval."""
    # Wilson's interval stays within [0, 1] and has a width at 0 and 1 too, where the
    # normal approximation has none.
    n, p = len(right), float(np.mean(right))
    low, high = binomtest(sum(right), n).proportion_ci(method="wilson")
    return Score(name, p, n, float(low), float(high))


def share_right(name: str, verdicts: Sequence[Verdict]) -> Score:
    """The share of verdicts that are 1."""
    return score(name, [verdict.value == 1 for verdict in verdicts])


def mean(name: str, values: Sequence[float] | np.ndarray) -> Score:
    """The mean of any figures with a normal interval, infinite for a single one."""
    x = np.asarray(values, np.float64)
    # One picture says nothing about the spread.
    half = 1.96 * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.inf
    middle = float(x.mean())
    return Score(name, middle, len(x), float(middle - half), float(middle + half))


def overall(name: str, parts: Sequence[Score]) -> Score:
    """The unweighted mean of scores, with intervals combined by MOVER.

    The distances of the bounds are added in squares (Zou and Donner 2008).
    """
    # Categories count equally, whatever their number of prompts: the benchmarks' rule.
    p = np.mean([part.score for part in parts])
    root = lambda off: np.sqrt(np.sum(np.square(off))) / len(parts)
    low = p - root([part.score - part.low for part in parts])
    high = p + root([part.high - part.score for part in parts])
    return Score(name, float(p), sum(x.n for x in parts), float(low), float(high))


def by_category(
    asked: Sequence[Asked], verdicts: Sequence[Verdict]
) -> dict[str, list[Verdict]]:
    groups = {}
    for question, verdict in zip(asked, verdicts, strict=True):
        groups.setdefault(question.category, []).append(verdict)
    return groups


def prompts(
    asked: Sequence[Asked], verdicts: Sequence[Verdict], name: str = ""
) -> list[dict]:
    """A row for each prompt of a category: score, number of pictures and reasons."""
    groups = {}
    for question, verdict in zip(asked, verdicts, strict=True):
        groups.setdefault((question.category, question.prompt), []).append(verdict)
    return [
        {
            "prompt": prompt,
            "split": f"{name} {category}".strip(),
            "score": float(np.mean([v.value for v in prompt_verdicts])),
            "n": len(prompt_verdicts),
            "reasons": [v.reason for v in prompt_verdicts if v.reason],
        }
        for (category, prompt), prompt_verdicts in groups.items()
    ]


def answers(function: Callable, wanted: str, count: int, *arguments: Any) -> list:
    """The list that the user's function returns; UserError if it has not `count` items.

    Messages call the function by its __name__.
    """
    replies = function(*arguments)
    name = called(function)
    try:
        replies = list(replies)
    except TypeError:
        kind = shown(type(replies).__name__)
        raise UserError(f"{name} returned {kind}; expected {count} {wanted}") from None
    if len(replies) != count:
        raise UserError(f"{name} returned {len(replies)} {wanted}; expected {count}")
    return replies


def called(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)
