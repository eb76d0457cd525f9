"""CLIP scores: how well pictures fit their captions (Radford 2021, Hessel 2021)."""

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray


def cosines(
    images: Float[ndarray, "n e"], texts: Float[ndarray, "n e"]
) -> Float64[ndarray, " n"]:
    """Cosine of each picture and its caption; the SD3 paper reports the mean."""
    # float64: the mean runs over many thousands of cosines.
    a, b = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # An embedding of zeros has cosine 0 and not NaN.
    return np.einsum("ne,ne->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)
