"""Precision and recall of pictures by nearest neighbours (Kynkaanniemi et al. 2019)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64
from numpy import ndarray

from sd3_jax.errors import UserError

NEIGHBOURS = 3  # the paper's
BLOCK = 1_024  # rows of distances at once


class PrecisionRecall(NamedTuple):
    """The share of generated pictures that lie among the real ones, and the share of
    real pictures that lie among the generated ones."""

    precision: float
    recall: float


def precision_recall(
    real: Float[ndarray, "n d"], generated: Float[ndarray, "m d"]
) -> PrecisionRecall:
    """A row is among a set if it is in the third neighbour's ball of one of its rows.

    Sets of different sizes have balls of different sizes: compare equal ones.
    """
    if min(len(real), len(generated)) <= NEIGHBOURS:
        raise UserError(
            f"precision and recall of {len(real)} and {len(generated)} features; each"
            f" needs more than {NEIGHBOURS}, the number of neighbours"
        )
    # Distances are differences of large squares: float32 would lose near neighbours.
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    return PrecisionRecall(
        float(among(generated, real).mean()), float(among(real, generated).mean())
    )


def among(x: ndarray, of: ndarray) -> Bool[ndarray, " n"]:
    """Whether each row of x is in a ball about a row of the others."""
    # (m,) squared radius of the ball about each row of `of`
    near = radii(of)
    # In blocks of rows, one at a time (a list would hold all): 50,000 x 50,000
    # distances would take 20 GB.
    blocks = (distances(x[i : i + BLOCK], of) for i in range(0, len(x), BLOCK))
    return np.concatenate([(block <= near).any(1) for block in blocks])


def radii(x: ndarray) -> Float64[ndarray, " n"]:
    """Squared distance of each row to its third neighbour, not counting itself."""
    blocks = (distances(x[i : i + BLOCK], x) for i in range(0, len(x), BLOCK))
    # The 0-th neighbour is the row itself.
    near = [np.partition(block, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for block in blocks]
    return np.concatenate(near)


def distances(a: ndarray, b: ndarray) -> Float64[ndarray, "n m"]:
    """Squared distances; 0 where only rounding differs, so that a copy lies in a ball
    of radius 0."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a b: one matrix product instead of (n, m, d)
    # numbers.
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    squared = squares - 2 * a @ b.T
    return np.where(squared < 1e-12 * squares, 0, squared)
