"""Frechet distance between two Gaussians fitted to features (Heusel et al. 2017)."""

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from sd3_jax.errors import UserError
from sd3_jax.evaluation.feature_statistics import Statistics


def frechet(a: Statistics, b: Statistics) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), in float64.

    The last trace is the sum of the singular values of S1^1/2 S2^1/2. Eigenvalues that
    are rounding errors are dropped, so that covariances of fewer pictures than numbers
    need no offset. UserError for fewer than two pictures, or for features of different
    lengths.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"{a} and {b}: both must be features of one extractor")
    # tr (S1^1/2 S2 S1^1/2)^1/2 is the sum of singular values of F1^T F2 for any factors
    # F F^T = S. The matrix root of S1 S2, which other implementations take, may be
    # complex where covariances are singular.
    of_a, of_b = a.covariance, b.covariance
    shared = np.linalg.svd(_factor(of_a).T @ _factor(of_b), compute_uv=False).sum()
    apart = np.square(a.mean - b.mean).sum()
    # Rounding can leave equal sets slightly below 0.
    return max(0.0, float(apart + np.trace(of_a) + np.trace(of_b) - 2 * shared))


def _factor(covariance: Float64[ndarray, "d d"]) -> Float64[ndarray, "d r"]:
    """F with F F^T the covariance, of as many columns as its rank."""
    # eigh reads one triangle only; the mean of both halves removes asymmetric rounding.
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    # numpy's matrix_rank uses this tolerance as well. Roots of rounding errors are as
    # large as sqrt(eps), so they are dropped before the root.
    floor = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    real = values > floor
    # (d, rank)
    return vectors[:, real] * np.sqrt(values[real])
