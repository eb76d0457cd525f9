"""The common form of adapters: changes of named weights, whatever file they are of."""

from typing import NamedTuple

import numpy as np
from jax import Array


class Factors(NamedTuple):
    """W + weight * a b of a linear map; alpha / rank is already in b.

    Shapes of parametrization.LowRank's a and b, with the layers' axis of scanned stacks
    and the groups of fused q, k and v.
    """

    a: Array | np.ndarray
    b: Array | np.ndarray


class Full(NamedTuple):
    """leaf + weight * delta, for kernels, biases, norm scales and embeddings."""

    delta: Array | np.ndarray  # in the leaf's own shape


# By component ("denoiser", "clip_l", "clip_g", "t5"), then by the leaf's path in
# variables["params"], its own name included ("kernel", "bias", "scale").
Adapter = dict[str, dict[tuple[str, ...], Factors | Full]]
