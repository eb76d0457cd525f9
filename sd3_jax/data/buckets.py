"""Aspect buckets: the shapes that pictures are cut to, and the bucket of each step.

A batch has one shape, H x W with about S^2 pixels (SD3 paper, sec. 5.3.2). The paper
does not list its shapes, so a rule chooses them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image


class Bucket(NamedTuple):
    """The sides of a bucket's pictures, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def table(
    height: int, width: int, *, count: int = 1, aspect: float = 2.0, unit: int = 16
) -> tuple[Bucket, ...]:
    """`count` shapes from tall to wide, each of at most height * width pixels.

    Aspects are evenly spaced by ratio, from 1 : aspect to aspect : 1. With a count of 1
    the shape is (height, width) itself. Sides are multiples of `unit`. No shape has
    more tokens than the square, so all fit a device's memory if the square does.
    Duplicate shapes are dropped, so there may be fewer than `count`.
    """
    if count == 1:
        return (Bucket(height, width),)
    area = height * width
    wide = [_shape(area, aspect**x, unit) for x in np.linspace(-1, 1, count) if x >= 0]
    tall = [Bucket(b.width, b.height) for b in reversed(wide)]
    # Tall shapes are the wide ones turned, so that neither is favoured; dict.fromkeys
    # drops repeats and keeps the order.
    return tuple(dict.fromkeys(tall[: count // 2] + wide))


def _shape(area: int, aspect: float, unit: int) -> Bucket:
    """The sides that lose least of the area and are nearest to the aspect."""
    tokens = area // unit**2  # tokens, if a unit is one
    # The best height is a neighbour of the ideal one, rounded either way.
    ideal = math.sqrt(tokens / aspect)
    tries = range(max(1, math.floor(ideal) - 1), math.ceil(ideal) + 2)

    def loss(h: int) -> float:
        w = max(1, min(tokens // h, round(h * aspect)))
        # Both are ratios, of tokens lost and of aspects; a wrong aspect counts twice.
        return math.log(tokens / (h * w)) + 2 * abs(math.log(w / h / aspect))

    h = min(tries, key=loss)
    w = max(1, min(tokens // h, round(h * aspect)))
    return Bucket(h * unit, w * unit)


class Fit(NamedTuple):
    """How a picture is cropped and resized into a bucket."""

    bucket: Bucket
    crop: tuple[int, int, int, int]  # top, left, height, width, in its own pixels
    enlarged: float  # the bucket's side over the crop's; above 1 it is upsampled
    kept: float  # share of its pixels that the crop has


def fit(height: int, width: int, buckets: Sequence[Bucket]) -> Fit:
    """The bucket of the nearest aspect, and the centre crop that fills it."""
    aspect = math.log(width / height)
    bucket = min(buckets, key=lambda b: abs(math.log(b.width / b.height) - aspect))
    # The larger scale makes the picture cover the bucket; the other axis is cropped.
    scale = max(bucket.height / height, bucket.width / width)
    h = min(height, max(1, round(bucket.height / scale)))
    w = min(width, max(1, round(bucket.width / scale)))
    crop = ((height - h) // 2, (width - w) // 2, h, w)
    return Fit(bucket, crop, scale, h * w / (height * width))


def cut(picture: UInt8[ndarray, "h w 3"], placement: Fit) -> UInt8[ndarray, "H W 3"]:
    """Crop a picture and resize it to its bucket (Lanczos, with antialiasing)."""
    top, left, h, w = placement.crop
    size = (placement.bucket.width, placement.bucket.height)
    if (h, w) == placement.bucket:
        return picture[top : top + h, left : left + w]
    box = (left, top, left + w, top + h)
    resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


class Turns:
    """The bucket of each step: as often as its weight says, evenly spread.

    Step s belongs to the bucket whose interval contains (s * phi + c) mod 1, where c
    depends on the seed. The share of any interval in any run of consecutive steps is
    off by a few steps at most.

    `place` also counts a bucket's earlier steps, in O(log s).
    """

    # Drawing buckets at random, or handing out whichever has a full batch, would need
    # the history of a run to resume it. Here bucket and examples depend on (seed, step)
    # alone: a run goes on from its step number, on any number of hosts.
    #
    # Integers, not floats: turns must be exact at step 10^12, and equal on all hosts.
    _ALL = 2**61 - 1  # the circle, in integers; prime, so that no step comes twice
    _STEP = round(_ALL * (math.sqrt(5) - 1) / 2)

    def __init__(self, weights: Sequence[int | float], seed: int = 0):
        total, sums = sum(weights), np.cumsum([0, *map(float, weights)])
        self._ends = [int(self._ALL * (x / float(total))) for x in sums[:-1]]
        # The last interval ends with the circle, whatever the sum above was rounded to.
        self._ends.append(self._ALL)
        self._start = int(np.random.default_rng(seed).integers(self._ALL))

    def place(self, step: int) -> tuple[int, int]:
        """(number of the step's bucket, count of earlier steps of that bucket)."""
        if len(self._ends) == 2:  # one bucket, whose turn is always
            return 0, step
        position = (self._STEP * step + self._start) % self._ALL
        bucket = sum(position >= end for end in self._ends[1:])
        low, high = self._ends[bucket : bucket + 2]
        return bucket, self._below(step, high) - self._below(step, low)

    def _below(self, steps: int, end: int) -> int:
        """How many of the first `steps` positions lie below `end`."""
        if steps == 0 or end == 0:
            return 0
        # Step i lies below `end` just if floor((a i + c) / m) differs from floor((a i +
        # c - end) / m); m is added so that nothing is negative, and counts one a step.
        m, a, c = self._ALL, self._STEP, self._start
        return _floors(steps, m, a, c) - (_floors(steps, m, a, c - end + m) - steps)


def _floors(n: int, m: int, a: int, b: int) -> int:
    """The sum of floor((a i + b) / m) over i < n, by Euclid's algorithm."""
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if top < m:
            return total
        n, b, m, a = top // m, top % m, a, m
