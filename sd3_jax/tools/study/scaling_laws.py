"""Scaling laws of the loss, and its correlation with other scores (paper, 5.3)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.stats import rankdata


class PowerLaw(NamedTuple):
    """loss = floor + scale * (x / x0)^-exponent, x0 the geometric mean of the x."""

    floor: float
    scale: float
    exponent: float
    x0: float
    error: float  # root mean square of the loss's logarithm

    def __call__(self, x: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
        return self.floor + self.scale * (x / self.x0) ** -self.exponent

    def __str__(self) -> str:
        floor = f"{self.floor:.4g} + " if self.floor else ""
        return f"{floor}{self.scale:.4g} (x / {self.x0:.3g})^-{self.exponent:.3g}"


def power_law(x: Float[ndarray, " n"], loss: Float[ndarray, " n"]) -> PowerLaw:
    """The law whose logarithm is nearest to the loss's, by least squares.

    For a given floor it is a line in logarithms; the floor is searched for below the
    least loss. It is 0 where there are fewer than four points.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    if len(x) < 2 or (x <= 0).any() or (loss <= 0).any():
        raise ValueError(
            f"power_law: got {len(x)} points, expected two or more, all > 0"
        )
    # Around the mean of log x, so that slope and height are uncorrelated.
    x0 = float(np.exp(np.log(x).mean()))
    # Three free numbers need more than three points.
    # A floor at the least loss itself would leave it the logarithm of 0.
    shares = np.linspace(0, 1, 400)[:-1] if len(x) > 3 else [0]
    return min(
        (_line(x, loss, x0, share * loss.min()) for share in shares),
        key=lambda law: law.error,
    )


def _line(x, loss, x0, floor) -> PowerLaw:
    # log (loss - floor) = height + slope log (x / x0)
    slope, height = np.polyfit(np.log(x / x0), np.log(loss - floor), 1)
    law = PowerLaw(float(floor), float(np.exp(height)), float(-slope), x0, 0.0)
    error = np.sqrt(np.mean((np.log(law(x)) - np.log(loss)) ** 2))
    return law._replace(error=float(error))


def frontier(x: Float[ndarray, " n"], loss: Float[ndarray, " n"]) -> ndarray:
    """Indices, by rising x, of the points that no point of less or equal x is below."""
    order = np.lexsort((loss, x))
    # The least loss at this compute or less; the frontier is where it falls.
    best = np.minimum.accumulate(loss[order])
    first = np.append(True, best[1:] < best[:-1])
    return order[first]


def correlation(a: Float[ndarray, " n"], b: Float[ndarray, " n"]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing theirs."""
    # NaN, of a run that diverged, ranks above all numbers.
    a, b = (rankdata(np.nan_to_num(x, nan=np.inf)) for x in (a, b))
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])
