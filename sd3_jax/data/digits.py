"""A built-in data set: scikit-learn's digit scans, coloured and composed, captioned.

Three kinds of picture: "a red seven"; "a red seven left of a blue three" (binding);
'the number "42" in green' (typography). Example i is a pure function of (seed, i).
"""

import functools
import re
import threading
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
}
DIGITS = "zero one two three four five six seven eight nine".split()
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("single", "pair", "number")
SPLITS = ("train", "tune", "test")
SIDE = 8  # of a scan, in pixels
_LOCK = threading.Lock()


class Thing(NamedTuple):
    """A coloured digit."""

    colour: str
    digit: int

    def __str__(self):
        return f"a {self.colour} {DIGITS[self.digit]}"


class Scene(NamedTuple):
    """What a caption describes: its things in reading order, and their relation."""

    kind: str
    things: tuple[Thing, ...]
    relation: str = ""

    def __str__(self):
        if self.kind == "single":
            return str(self.things[0])
        if self.kind == "pair":
            return f"{self.things[0]} {self.relation} {self.things[1]}"
        text = "".join(str(thing.digit) for thing in self.things)
        return f'the number "{text}" in {self.things[0].colour}'

    def placed(self) -> tuple[tuple[Thing, ...], str]:
        """The things from left to right or top to bottom, and the axis they lie on."""
        axis = "y" if self.relation in ("above", "below") else "x"
        swap = self.relation in ("right of", "below")
        return self.things[::-1] if swap else self.things, axis

    def ordered(self) -> "Scene":
        """The same picture, described from left to right or from top to bottom."""
        things, axis = self.placed()
        relation = self.relation and {"x": "left of", "y": "above"}[axis]
        return Scene(self.kind, things, relation)


def parse(caption: str) -> Scene | None:
    """Parse a caption; None if it is not of the three kinds."""
    thing = rf"a ({'|'.join(COLOURS)}) ({'|'.join(DIGITS)})"
    if m := re.fullmatch(thing, caption):
        return Scene("single", (Thing(m[1], DIGITS.index(m[2])),))
    if m := re.fullmatch(rf"{thing} ({'|'.join(RELATIONS)}) {thing}", caption):
        first, second = Thing(m[1], DIGITS.index(m[2])), Thing(m[4], DIGITS.index(m[5]))
        return Scene("pair", (first, second), m[3])
    if m := re.fullmatch(rf'the number "(\d\d)" in ({"|".join(COLOURS)})', caption):
        return Scene("number", tuple(Thing(m[2], int(d)) for d in m[1]))
    return None


@functools.cache
def scans(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scans as (n, 8, 8) float32 in [0, 1] and their digits; one in five held out."""
    # A second to import, which only recipes of digits should pay. One thread at a time:
    # modules that import each other may be half there for a second thread.
    with _LOCK:
        from sklearn.datasets import load_digits

    data = load_digits()
    in_split = (np.arange(len(data.target)) % 5 == 0) == held_out
    return (data.images[in_split] / 16).astype(np.float32), data.target[in_split]


@functools.cache
def splits() -> tuple[dict, dict]:
    """The split of every pair, in a canonical order, and of every two-digit number.

    One in ten of the pairs is for tuning and one in ten for the scores, and likewise of
    the numbers, each in all its colours.
    """
    # "A left of B" and "B right of A" are one picture: with two keys, a test picture
    # could be in training under its other caption.
    # The paper's arXiv number: the split does not depend on a run's seed.
    rng = np.random.default_rng(2403_03206)
    things = [Thing(c, d) for c in COLOURS for d in range(10)]
    pairs = [(a, b, axis) for a in things for b in things for axis in "xy"]
    numbers = [f"{n:02d}" for n in range(100)]

    def assign(keys):
        order = rng.permutation(len(keys))
        part = {k: SPLITS[max(0, 2 - 10 * i // len(keys))] for i, k in enumerate(order)}
        return {key: part[i] for i, key in enumerate(keys)}

    return assign(pairs), assign(numbers)


def split_of(scene: Scene) -> str:
    """The split of a scene; all single digits are in training."""
    pairs, numbers = splits()
    if scene.kind == "pair":
        (first, second), axis = scene.placed()
        return pairs[first, second, axis]
    if scene.kind == "number":
        return numbers["".join(str(thing.digit) for thing in scene.things)]
    return "train"


@functools.cache
def scenes(kind: str, split: str) -> tuple[Scene, ...]:
    """All scenes of a kind in a split, in a fixed order; singles are in every split."""
    things = [Thing(c, d) for c in COLOURS for d in range(10)]
    if kind == "single":
        return tuple(Scene(kind, (a,)) for a in things)
    if kind == "pair":
        candidates = [
            Scene(kind, (a, b), r) for a in things for b in things for r in RELATIONS
        ]
    else:
        candidates = [
            Scene(kind, (Thing(c, n // 10), Thing(c, n % 10)))
            for c in COLOURS
            for n in range(100)
        ]
    return tuple(scene for scene in candidates if split_of(scene) == split)


@dataclass(frozen=True)
class Digits:
    """Compositions on a height x width canvas, kinds drawn by the weights of `mix`.

    The first `easy` examples describe every pair from left to right or top to bottom;
    later ones in either order. `held_out` uses scans that training never sees; captions
    are always of the training split.
    """

    height: int = 16
    width: int = 16
    mix: tuple[float, ...] = (0.2, 0.5, 0.3)
    easy: int = 0
    seed: int = 0
    held_out: bool = False

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray | list[str]]:
        """Pictures u8 (n, h, w, 3) and captions of the examples with these indices."""
        chosen = self.scenes(indices)
        # Another stream than the scenes', or handwriting would depend on the scene.
        rows = draws(self.seed + 1, indices, 2)
        image = np.stack([self.draw(s, r) for s, r in zip(chosen, rows)])
        return {"image": image, "caption": [str(scene) for scene in chosen]}

    def scenes(self, indices: np.ndarray) -> list[Scene]:
        """What the examples with these indices show; their captions are its text."""
        return [
            self.scene(*row).ordered() if index < self.easy else self.scene(*row)
            for index, row in zip(indices, draws(self.seed, indices, 2))
        ]

    def names(self, indices: np.ndarray) -> list[str]:
        """The examples with these indices, for messages: "digits:104"."""
        return [f"digits:{int(i)}" for i in indices]

    def identity(self) -> dict[str, Any]:
        """A flat, short summary of the data, for a checkpoint to compare on resume."""
        return {"name": "digits", **asdict(self), "mix": list(self.mix)}

    def scene(self, kind: float, choice: float) -> Scene:
        """The scene that two uniform numbers choose: its kind, then which of those."""
        shares = np.cumsum(self.mix) / np.sum(self.mix)
        # "right": a kind whose weight is 0 has an empty interval and is never drawn.
        choices = scenes(KINDS[np.searchsorted(shares, kind, "right")], "train")
        return choices[int(choice * len(choices))]

    def draw(self, scene: Scene, u: np.ndarray) -> np.ndarray:
        """Draw a scene in scans that two uniform numbers `u` choose."""
        hands = [_handwriting(self.held_out)[t.digit] for t in scene.placed()[0]]
        return self.compose(scene, [h[int(v * len(h))] for h, v in zip(hands, u)])

    def compose(self, scene: Scene, inks: list[np.ndarray]) -> np.ndarray:
        """Draw a scene with these scans (8, 8), from left to right or downward."""
        things, axis = scene.placed()
        canvas = np.zeros((self.height, self.width, 3), np.float32)
        for thing, ink, (y, x) in zip(things, inks, self.places(scene, axis)):
            patch = canvas[y : y + SIDE, x : x + SIDE]
            # Maximum, not a sum: where scans touch, colours stay what captions say.
            np.maximum(patch, ink[..., None] * COLOURS[thing.colour], out=patch)
        return np.rint(canvas * 255).astype(np.uint8)

    def places(self, scene: Scene, axis: str) -> list[tuple[int, int]]:
        """Upper left corners of scans: in the middle, or at both ends of an axis."""
        y, x = (self.height - SIDE) // 2, (self.width - SIDE) // 2
        if len(scene.things) == 1:
            return [(y, x)]
        return [(y, 0), (y, 2 * x)] if axis == "x" else [(0, x), (2 * y, x)]


@functools.cache
def _handwriting(held_out: bool) -> list[np.ndarray]:
    images, labels = scans(held_out)
    return [images[labels == digit] for digit in range(10)]


def draws(seed: int, indices: np.ndarray, n: int) -> np.ndarray:
    """n uniform numbers in [0, 1) for each index, by splitmix64."""
    # A hash of (seed, index), not a generator: there is no state to save or to resume.
    # The top 53 bits are a double's.
    with np.errstate(over="ignore"):
        z = np.asarray(indices, np.uint64)[:, None] * np.uint64(n)
        z = z + np.arange(n, dtype=np.uint64) + np.uint64(seed) * np.uint64(2**40 + 1)
        for _ in range(2):
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53
