"""Reads pictures of digits: which digits, in which colours, at which places."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sd3_jax.data.digits import COLOURS, SIDE, Scene, Thing, scans

if TYPE_CHECKING:
    from sklearn.svm import SVC

INK = 0.25  # a pixel of less is paper


class Found(NamedTuple):
    """A digit that was read, and the centre of its box as (y, x)."""

    thing: Thing
    centre: tuple[float, float]


def matches(scene: Scene, image: np.ndarray) -> bool:
    """Whether a picture u8 (h, w, 3) shows the scene: things, colours and places."""
    digits = detect(image)
    things, axis = scene.placed()
    if tuple(f.thing for f in digits) != things:
        return False
    if len(digits) == 1:
        return True
    # In order and within 45 degrees of the axis that the caption asks for.
    dy, dx = (b - a for a, b in zip(digits[0].centre, digits[1].centre))
    return bool(dx > abs(dy) if axis == "x" else dy > abs(dx))


def detect(image: np.ndarray) -> list[Found]:
    """One or two digits, from left to right or top to bottom."""
    ink = image.max(-1) / 255.0
    return [_read(image, ink, box) for box in _boxes(ink > INK)]


def _boxes(dark: np.ndarray) -> list[tuple[slice, slice]]:
    """The ink's bounding box, cut at the canvas's middle if too long for one."""
    box = _bounds(dark)
    if box is None:
        return []
    # Two digits lie in different halves of the canvas, so a long box is cut there.
    sizes = [s.stop - s.start for s in box]
    axis = int(np.argmax(sizes))
    if sizes[axis] <= SIDE + 1:
        return [box]
    cut = dark.shape[axis] // 2
    first, second = dark.copy(), dark.copy()
    np.moveaxis(first, axis, 0)[cut:] = False
    np.moveaxis(second, axis, 0)[:cut] = False
    return [b for b in (_bounds(first), _bounds(second)) if b is not None]


def _bounds(dark: np.ndarray) -> tuple[slice, slice] | None:
    if not dark.any():
        return None
    rows, columns = (np.flatnonzero(dark.any(1 - axis)) for axis in (0, 1))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _read(image: np.ndarray, ink: np.ndarray, box: tuple[slice, slice]) -> Found:
    digit = int(classifier().predict(_centred(ink[box])[None])[0])
    centre = tuple((s.start + s.stop) / 2 for s in box)
    return Found(Thing(_colour(image[box]), digit), centre)


def _colour(pixels: np.ndarray) -> str:
    """The colour nearest in direction to the sum of the ink."""
    # The sum weighs pixels by brightness, so the faint edges of strokes count little.
    total = pixels.reshape(-1, 3).astype(np.float64).sum(0)
    total /= np.linalg.norm(total) + 1e-9
    near = {
        c: total @ np.array(rgb) / np.linalg.norm(rgb) for c, rgb in COLOURS.items()
    }
    # The largest cosine, since all vectors are divided by their lengths.
    return max(near, key=near.get)


def _centred(ink: np.ndarray) -> np.ndarray:
    """The ink in the middle of an empty cell, flattened; where it stood is lost."""
    cell = np.zeros((SIDE, SIDE))
    # Blurred strokes may be wider than a scan.
    ink = ink[:SIDE, :SIDE]
    y, x = ((SIDE - n) // 2 for n in ink.shape)
    cell[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
    return cell.ravel()


@functools.cache
def classifier() -> "SVC":
    """A digit classifier fitted on training scans only."""
    from sklearn.svm import SVC  # slow to import, and jobs of other data do not need it

    # None of the held-out scans, on which digit_scenes.read_scans measures it.
    images, labels = scans(held_out=False)
    cells = [_centred(ink[_bounds(ink > INK)]) for ink in images]
    return SVC(C=10, gamma=0.04).fit(np.stack(cells), labels)
