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
    """The category's file of prompts, one a line, in the benchmark's dataset."""
    return f"{category}_val.txt"


def names(specs: Sequence[str]) -> dict[str, str]:
    """Parses "color=package.module:function" into names of functions by category."""
    function_names = {}
    for spec in specs:
        category, _, name = (part.strip() for part in spec.partition("="))
        if category not in CATEGORIES:
            raise UserError(f'"{shown(category)}"{nearest(category, CATEGORIES)}')
        if category in function_names or not name:
            problem = (
                "appears twice" if category in function_names else "has no function"
            )
            wanted = f'expected "{category}=package.module:function"'
            raise UserError(f'"{category}" {problem}; {wanted}, once')
        function_names[category] = name
    return function_names


def parse(line: str, category: str) -> Asked:
    return Asked(prompt_text.checked(line), category)


def scorer(functions: Mapping[str, Callable]) -> scorers.Scorer:
    """A scorer that calls each category's function with that category's pictures."""

    def judge(asked, images):
        values = {}
        # Each category has a scorer of its own, so a batch is asked about in groups.
        for category in dict.fromkeys(question.category for question in asked):
            indices = [
                i for i, question in enumerate(asked) if question.category == category
            ]
            arguments = images[indices], [asked[i].prompt for i in indices]
            numbers = answers(functions[category], "numbers", len(indices), *arguments)
            for i, value in zip(indices, numbers):
                values[i] = _number(value, functions[category])
        return [Verdict(values[i]) for i in range(len(asked))]

    return judge


def rows(asked: Sequence[Asked], verdicts: Sequence[Verdict]) -> list[Score]:
    """A mean for each category; the benchmark has no overall."""
    # Categories without prompts in this run have no row.
    groups = scorers.by_category(asked, verdicts)
    return [
        scorers.mean(f"T2I-CompBench {name}", [v.value for v in groups[name]])
        for name in CATEGORIES
        if name in groups
    ]


def _number(value, function: Callable) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    # NaN fails the comparison as well, so that text and NaN give one message.
    if not 0 <= number <= 1:
        complaint = f"{called(function)} returned {shown(value)}"
        raise UserError(f"{complaint}; expected a number in [0, 1] for each picture")
    return number
