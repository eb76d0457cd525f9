"""Variants ranked against one another by several scores at once (paper, 5.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray


def fronts(scores: Float[ndarray, "n k"]) -> Int[ndarray, " n"]:
    """The Pareto front of each of n rows, 1 is the best; lower scores are better, and
    a row with NaN is in the last front.

    Non-dominated sorting: the first front are those that no other is at least as good
    as in all scores and better than in one; the next are those of what is left.
    """
    # NaN compares false, so nothing would dominate it.
    lost = np.isnan(scores).any(-1, keepdims=True)
    scores = np.where(lost, np.inf, scores)
    at_least = (scores[:, None] <= scores[None]).all(-1)  # [i, j]: i as good as j
    # (n, n): i is better than j in at least one score
    better = (scores[:, None] < scores[None]).any(-1)
    dominates = at_least & better
    rank, left = np.zeros(len(scores), int), np.ones(len(scores), bool)
    while left.any():
        # Not dominated by any that is left: the next front.
        free = left & ~dominates[left].any(0)
        # Ranks begin at 0 for all, so the first front gets 1.
        rank[free] = rank.max() + 1
        left &= ~free
    return rank


def mean_ranks(
    settings: Sequence[Mapping[str, tuple[float, ...]]],
) -> dict[str, float]:
    """Of control settings, each {variant: scores, better when lower}: a variant's mean
    front over those that have it."""
    ranks: dict[str, list[int]] = {}
    for setting in settings:
        names = list(setting)
        front_ranks = fronts(np.array([setting[name] for name in names], float))
        for name, rank in zip(names, front_ranks.tolist()):
            ranks.setdefault(name, []).append(rank)
    return {name: float(np.mean(x)) for name, x in ranks.items()}
