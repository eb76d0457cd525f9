"""T2I-CompBench (Huang et al. 2023, arXiv 2307.06350): means of the user's scorers.

    score(images u8 (n, h, w, 3), prompts) -> n numbers in [0, 1]

The benchmark's are BLIP-VQA for color, shape and texture, UniDet for spatial,
3d_spatial and numeracy, CLIP for non_spatial, and a mean of the three for complex.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError, nearest
from sd3_jax.evaluation import scorers
from sd3_jax.evaluation.scorers import Asked, Score, Verdict, answers, called
from sd3_jax.foreign_text import shown

CATEGORIES = (
    *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy"),
    *("non_spatial", "complex"),
)


def file(category: str) -> str:
    """Its validation prompts, one a line, in the benchmark's examples/dataset."""
    return f"{category}_val.txt"


def names(specs: Sequence[str]) -> dict[str, str]:
    """Functions' names by category, of "color=package.module:function"."""
    found = {}
    for spec in specs:
        category, _, name = (part.strip() for part in spec.partition("="))
        if category not in CATEGORIES:
            raise UserError(f'"{shown(category)}"{nearest(category, CATEGORIES)}')
        if category in found or not name:
            told = "stands twice" if category in found else "has no function"
            wanted = f'wanted "{category}=package.module:function"'
            raise UserError(f'"{category}" {told}; {wanted}, once')
        found[category] = name
    return found


def parse(line: str, category: str) -> Asked:
    return Asked(prompt_text.checked(line), category)


def scorer(functions: Mapping[str, Callable]) -> scorers.Scorer:
    """A scorer that asks each category's function about its own pictures."""

    def judge(asked, images):
        values = {}
        for category in dict.fromkeys(each.category for each in asked):
            mine = [i for i, each in enumerate(asked) if each.category == category]
            given = images[mine], [asked[i].prompt for i in mine]
            found = answers(functions[category], "numbers", len(mine), *given)
            for i, value in zip(mine, found):
                values[i] = _number(value, functions[category])
        return [Verdict(values[i]) for i in range(len(asked))]

    return judge


def rows(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[Score]:
    """A mean for each category; the benchmark has no overall."""
    found = scorers.by_category(asked, verdicts)
    return [
        scorers.mean(f"T2I-CompBench {name}", [v.value for v in found[name]])
        for name in CATEGORIES
        if name in found
    ]


def _number(value, function: Callable) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:
        told = f"{called(function)} gave {shown(value)}"
        raise UserError(f"{told}; wanted a number in [0, 1] a picture")
    return number
