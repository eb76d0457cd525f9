"""Steps that a cached network computes in any case, of methods that decide beforehand.

Arrays are numpy's, one entry a step: the caller computes them on the host, and a
program reads them as data.
"""

import numpy as np
from jaxtyping import Bool, Float

from sd3_jax.diffusion.checks import require


def retained(steps: int, retention: float) -> int:
    """How many first steps are computed: a share of all, rounded as in diffusers."""
    # Python's round() rounds half to even, and would differ at 0.5.
    return int(retention * steps + 0.5)


def opening(steps: int, count: int) -> Bool[np.ndarray, " steps"]:
    """The first `count` steps, and at least one, which has nothing to reuse."""
    return np.arange(steps) < max(count, 1)


def magnitudes(
    ratios: Float[np.ndarray, " steps"],
    *,
    threshold: float,
    most: int,
    retention: float,
) -> Bool[np.ndarray, " steps"]:
    """MagCache (Ma et al. 2025, sec. 4): steps whose error grows beyond `threshold`.

    ratios[i] is the mean |residual i| / |residual i - 1|. A skipped step adds |1 -
    their product| since the last computed step. At most `most` steps in a row are
    skipped, and none of the first share `retention`.
    """
    first = retained(len(ratios), retention)
    must = opening(len(ratios), first)
    product, error, skipped = 1.0, 0.0, 0
    for step in range(first, len(ratios)):
        product *= float(ratios[step])
        error += abs(1 - product)
        skipped += 1
        # Errors add up while steps are skipped, and a computed step clears them.
        if must[step] or error > threshold or skipped > most:
            must[step] = True
            product, error, skipped = 1.0, 0.0, 0
    return must


def resampled(
    ratios: Float[np.ndarray, " n"], steps: int
) -> Float[np.ndarray, " steps"]:
    """Ratios for another number of steps, each that of the nearest, as in diffusers."""
    if steps == 1:
        # The scale below would divide by 0.
        return ratios[-1:]
    # float32 and half to even, as torch.round of diffusers' nearest_interp.
    scale = np.float32((len(ratios) - 1) / (steps - 1))
    places = np.round(np.arange(steps, dtype=np.float32) * scale)
    return ratios[places.astype(int)]


def every(steps: int, *, interval: int, warmup: int) -> Bool[np.ndarray, " steps"]:
    """TaylorSeer (Liu et al. 2025): the first `warmup` steps, then one in `interval`.

    As in diffusers, step `warmup` is the first that is predicted.
    """
    require(interval >= 1, "interval", interval, "1 or more")
    # Negative multiples of `interval` are steps before `warmup`, which are computed
    # anyway.
    places = np.arange(steps) - warmup - 1
    return opening(steps, warmup) | (places % interval == 0)
