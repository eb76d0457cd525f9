"""Statistics of preferences: win rates, Bradley-Terry strengths, agreement.

Ties are half a win for each side in strengths, and no part of win rates.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import choix
import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sd3_jax.evaluation.scorers import Score, score

RESAMPLES = 1000
# Regularization of choix: a source that never wins would have a strength of -infinity.
ALPHA = 0.01


def win_rate(name: str, wins: int, losses: int) -> Score | None:
    """Share of wins with Wilson's 95 % interval; None without decided votes."""
    if not wins + losses:
        return None
    return score(name, [True] * wins + [False] * losses)


def bradley_terry(wins: Float[ndarray, "n n"]) -> Float[ndarray, " n"]:
    """Strengths theta of n sources, with mean 0 (Bradley and Terry 1952).

    wins[i, j] is how often i won against j. P(i beats j) = 1 / (1 + exp(theta_j -
    theta_i)). The maximum of the likelihood is found by iterated Luce spectral ranking
    (Maystre and Grossglauser 2015, choix.ilsr_pairwise_dense).
    """
    # The likelihood is the same for theta + c, so that a mean has to be chosen.
    strengths = choix.ilsr_pairwise_dense(wins, alpha=ALPHA, max_iter=1000)
    return strengths - strengths.mean()


def strength_intervals(
    wins: Float[ndarray, "p n n"], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """95 % intervals of `bradley_terry`: a percentile bootstrap over p prompts.

    Prompts and not votes are drawn: votes on one prompt's pictures are alike.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        drawn = rng.integers(len(wins), size=len(wins))
        samples.append(bradley_terry(wins[drawn].sum(0)))
    low, high = np.percentile(samples, [2.5, 97.5], axis=0)
    return low, high


def krippendorff_alpha(
    answers: Iterable[tuple[Hashable, Hashable]],
) -> tuple[float | None, int]:
    """Agreement of voters on (unit, value), and how many units have two values or more.

    Krippendorff's alpha for nominal data (Krippendorff 2011, "Computing
    Krippendorff's alpha-reliability", section C): 1 is perfect agreement, 0 is chance.
    Any number of voters may have judged a unit. None if nothing varies, or if no unit
    has two values.
    """
    by_unit: dict[Hashable, Counter] = {}
    for unit, value in answers:
        by_unit.setdefault(unit, Counter())[value] += 1
    # A single value has none to agree with: such units leave the reliability data
    # (ibid.).
    units = [x for x in by_unit.values() if x.total() > 1]
    if not units:
        return None, 0
    values = sorted({value for unit in units for value in unit}, key=str)
    counts: Int[ndarray, "u v"] = np.array([[x[v] for v in values] for x in units])
    per_unit = counts.sum(1)  # (u,)
    totals = counts.sum(0).astype(float)  # (v,)
    n = totals.sum()
    # Disagreeing ordered pairs of one unit, each weighted by 1 / (m_u - 1).
    observed = ((per_unit**2 - (counts**2).sum(1)) / (per_unit - 1)).sum()
    # Ordered pairs of all values that differ, as if voters answered by chance.
    expected = (n**2 - (totals**2).sum()) / (n - 1)
    if not expected:
        return None, len(units)
    return float(1 - observed / expected), len(units)


def win_matrix(
    outcomes: Sequence[tuple[str, str, str, str]], names: Sequence[str]
) -> Float[ndarray, "p n n"]:
    """Wins by prompt of (prompt, first, second, winner); a tie is half a win for each.

    "bad" counts nothing: neither picture is preferred, nor are they equally good.
    """
    prompts = {prompt: i for i, prompt in enumerate(sorted({x[0] for x in outcomes}))}
    place = {name: i for i, name in enumerate(names)}
    wins = np.zeros((len(prompts), len(names), len(names)))
    for prompt, first, second, winner in outcomes:
        a, b = place[first], place[second]
        if winner in ("first", "tie"):
            wins[prompts[prompt], a, b] += 1 if winner == "first" else 0.5
        if winner in ("second", "tie"):
            wins[prompts[prompt], b, a] += 1 if winner == "second" else 0.5
    return wins
