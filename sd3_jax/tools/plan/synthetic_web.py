"""Synthetic picture sizes with the web's mixture, for plans of future data."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 2**16  # pictures at a time: memory does not depend on n
SHAPES = {  # width / height of pictures on the web, roughly, and their shares
    3 / 2: 0.22,
    4 / 3: 0.20,
    1: 0.17,
    16 / 9: 0.11,
    2 / 3: 0.10,
    3 / 4: 0.09,
    9 / 16: 0.05,
    5 / 4: 0.03,
    5 / 2: 0.02,  # panoramas
    4: 0.01,
}
LONG, SPREAD = 1_000, 0.5  # pixels of the median long side; of its logarithm
SIDES = 16, 20_000  # pixels that a picture's side may have


def sizes(n: int, *, seed: int = 0) -> np.ndarray:
    """(n, 2) heights and widths in pixels of invented pictures, the web's mixture.

    Of more pictures with the same seed, the first n are these.
    """
    return np.concatenate([np.zeros((0, 2), np.int32), *blocks(n, seed)])


def nearest(pictures: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of each picture, the nearest by aspect, as data.buckets.fit has it."""
    aspects = np.array([math.log(width / height) for height, width in buckets])
    picture_aspects = np.log(pictures[:, 1] / pictures[:, 0])
    return np.abs(aspects - picture_aspects[:, None]).argmin(1)


def fits(
    pictures: np.ndarray, buckets: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each picture the bucket, how much larger it gets, and how much is kept.

    What data.buckets.fit says of one, of (n, 2) heights and widths.
    """
    of = nearest(pictures, buckets)
    filled = np.asarray(buckets)[of]
    scale = (filled / pictures).max(1)
    crop = np.minimum(pictures, np.maximum(1, np.rint(filled / scale[:, None])))
    return of, scale, crop.prod(1) / pictures.prod(1, dtype=np.float64)


def blocks(n: int, seed: int) -> Iterator[np.ndarray]:
    """(m, 2) heights and widths, block by block; each block has its own seed."""
    aspects, shares = np.array(list(SHAPES)), np.array(list(SHAPES.values()))
    for number, start in enumerate(range(0, n, BLOCK)):
        # A seed for each block: the first n pictures do not depend on how many follow.
        rng = np.random.default_rng([seed, number])
        # A few percent off: pictures are cropped by hand.
        aspect = rng.choice(aspects, BLOCK, p=shares)
        aspect *= np.exp(
            np.where(rng.random(BLOCK) < 0.3, 0.08, 0.0) * rng.normal(size=BLOCK)
        )
        long = np.exp(rng.normal(math.log(LONG), SPREAD, BLOCK))
        height, width = long / np.maximum(aspect, 1), long * np.minimum(aspect, 1)
        block_sizes = (
            np.rint(np.stack([height, width], 1)).clip(*SIDES).astype(np.int32)
        )
        yield block_sizes[: min(BLOCK, n - start)]
