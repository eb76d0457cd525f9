"""Kernel distance: squared MMD of a cubic kernel, unbiased (Binkowski et al. 2018)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sd3_jax.errors import UserError

SUBSETS, SIZE = 100, 1_000  # the paper's; its tables are of the mean over subsets


class Kid(NamedTuple):
    mean: float  # near 0, and as often below it, for two sets of one distribution
    std: float  # over subsets, which share pictures: not an error of the mean
    size: int


def kid(
    a: Float[ndarray, "n d"],
    b: Float[ndarray, "m d"],
    *,
    size: int = SIZE,
) -> Kid:
    """KID over random subsets of `size` features, or over all if there are fewer."""
    size = min(size, len(a), len(b))
    if size < 2:
        raise UserError(f"KID of {len(a)} and {len(b)} features; each needs at least 2")
    if size == len(a) == len(b):
        return Kid(mmd(a, b), 0.0, size)
    # Subsets bound the memory of the kernel matrix, and give a spread.
    rng = np.random.default_rng(0)
    # Without replacement: a feature drawn twice would add its kernel with itself.
    draw = lambda x: x[rng.choice(len(x), size, replace=False)]
    estimates = [mmd(draw(a), draw(b)) for _ in range(SUBSETS)]
    return Kid(float(np.mean(estimates)), float(np.std(estimates)), size)


def mmd(a: Float[ndarray, "n d"], b: Float[ndarray, "m d"]) -> float:
    """Squared MMD, unbiased: without the kernel of a feature with itself."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    # The paper's cubic polynomial; it needs no bandwidth.
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    # Without the diagonal the estimate is unbiased, and may be negative.
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(within(kernel(a, a)) + within(kernel(b, b)) - 2 * kernel(a, b).mean())
