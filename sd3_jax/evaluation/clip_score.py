"""How well pictures fit their captions, by CLIP (Radford 2021, Hessel et al. 2021)."""

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray


def cosines(
    images: Float[ndarray, "n e"], texts: Float[ndarray, "n e"]
) -> Float64[ndarray, " n"]:
    """Of each picture and its caption, as the SD3 paper's tables have their mean."""
    # float64: the mean runs over many thousands of cosines.
    a, b = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    # An embedding of zeros has cosine 0 and not NaN.
    return np.einsum("ne,ne->n", a, b) / np.maximum(lengths, np.finfo(np.float64).tiny)


def torchmetrics(similarities: Float64[ndarray, " n"]) -> float:
    """torchmetrics' CLIPScore: 100 times the mean, not below 0."""
    # torchmetrics clips the mean at 0, Hessel et al. each cosine.
    return max(0.0, 100 * float(similarities.mean()))


def hessel(similarities: Float64[ndarray, " n"]) -> float:
    """CLIP-S of the paper of that name: each 2.5 times, not below 0. Its captions are
    prefixed with "A photo depicts", which is the caller's to do."""
    return 2.5 * float(np.maximum(similarities, 0).mean())
