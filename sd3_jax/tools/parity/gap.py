"""How far two arrays are apart."""

from typing import NamedTuple

import numpy as np


class Gap(NamedTuple):
    """max |a - b| / std(b), |a - b| / |b| and 1 - cosine, in float64."""

    largest: float
    relative: float
    angle: float


def gap(ours, theirs) -> Gap:
    # float64 first: norms of half-precision arrays overflow or round.
    a, b = (np.asarray(x).astype(np.float64).ravel() for x in (ours, theirs))
    if np.shape(ours) != np.shape(theirs):
        raise ValueError(f"ours is {np.shape(ours)}, theirs {np.shape(theirs)}")
    # PyTorch's array is the reference of the first two measures; the angle has none.
    size = np.linalg.norm(b)
    difference = np.linalg.norm(a - b)
    # `or 1.0`: two arrays of zeros agree.
    cosine = a @ b / (np.linalg.norm(a) * size or 1.0)
    return Gap(
        float(np.abs(a - b).max() / (b.std() or 1.0)),
        float(difference / (size or 1.0)),
        float(1 - cosine),
    )
