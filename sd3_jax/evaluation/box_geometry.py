"""Relations and overlap of two boxes, by GenEval's rules."""

from collections.abc import Sequence

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
OFFSET = 0.1  # of both sizes, within which centres are not apart


def relations(a: Sequence, b: Sequence, offset: float = OFFSET) -> set[str]:
    """The relations of box a to box b: up to two of RELATIONS.

    Centres count as apart by what exceeds `offset` times the sum of both sizes.
    """
    a, b = np.reshape(a, (2, 2)), np.reshape(b, (2, 2))  # corners, (x, y)
    apart = a.mean(0) - b.mean(0)
    size = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])
    # Differences of centres within `offset` of both sizes count as none.
    beyond = np.sign(apart) * np.maximum(np.abs(apart) - offset * size, 0)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    # A component must exceed half of the distance, which is 30 degrees from the other
    # axis; y points down.
    x, y = beyond / np.linalg.norm(apart)
    there = zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5))
    return {name for name, holds in there if holds}


def iou(a: Sequence, b: Sequence) -> float:
    """Intersection over union of boxes whose last pixels are inside them."""
    # The + 1 is the benchmark's: its boxes end at their last pixel.
    area = lambda x0, y0, x1, y1: max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)
    inner = (*map(max, a[:2], b[:2]), *map(min, a[2:], b[2:]))
    intersection = area(*inner)
    union = area(*a) + area(*b) - intersection
    return intersection / union if union else 0.0
