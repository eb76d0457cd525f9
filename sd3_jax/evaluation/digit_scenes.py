"""A small GenEval on digits: the share of pictures that show their scene."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from sd3_jax.data import digits
from sd3_jax.data.digits import Digits, Scene, Thing
from sd3_jax.evaluation.digit_reader import matches
from sd3_jax.evaluation.scorers import Asked, Score, Verdict, score

NAMES = {"single": "single digits", "pair": "pairs", "number": "numbers"}


def sample_scenes(kind: str, split: str, count: int) -> list[Scene]:
    """`count` scenes of a kind and split, in a fixed shuffled order, repeated."""
    every = digits.scenes(kind, split)
    # A fixed seed: scores of different checkpoints are of the same scenes.
    order = np.random.default_rng(1).permutation(len(every))
    return [every[order[i % len(every)]] for i in range(count)]


def scorer(asked: Sequence[Asked], images: UInt8[ndarray, "n h w 3"]) -> list[Verdict]:
    """A scorer (evaluation/scorers.py) for digits; a question's `wanted` is a Scene."""
    pairs = zip(asked, images, strict=True)
    return [
        Verdict(float(matches(question.wanted, image))) for question, image in pairs
    ]


def read_scans(height: int, width: int) -> Score:
    """The scorer's accuracy on all held-out scans."""
    # Colours in turn, so that each digit is read in all of them.
    canvas, colours = Digits(height, width), itertools.cycle(digits.COLOURS)
    right = []
    for ink, digit, colour in zip(*digits.scans(held_out=True), colours):
        scene = Scene("single", (Thing(colour, int(digit)),))
        right.append(matches(scene, canvas.compose(scene, [ink])))
    return score("scorer on real scans", right)


def ceiling(height: int, width: int, kind: str, count: int) -> Score:
    """The scorer's accuracy on real scenes, composed from held-out scans."""
    # A mix of one kind only.
    mix = tuple(float(k == kind) for k in digits.KINDS)
    batch = Digits(height, width, mix, held_out=True).batch(np.arange(count))
    right = [
        matches(digits.parse(caption), image)
        for caption, image in zip(batch["caption"], batch["image"])
    ]
    return score(f"scorer on real {NAMES[kind]}", right)


def variety(sample: Callable, scenes: Sequence[Scene], *, per_scene: int = 8) -> float:
    """Diversity of the pictures of one caption; real pictures have 1.

    The mean distance between two pictures of a caption, over the mean distance between
    two compositions of it from real scans. 0 means that all pictures are the same.
    """
    captions = [str(scene) for scene in scenes for _ in range(per_scene)]
    images = sample(captions, list(range(len(captions))))
    real = Digits(*images.shape[1:3], held_out=True)
    u = digits.draws(0, np.arange(len(captions)), 2)
    drawn = [real.draw(scenes[i // per_scene], u[i]) for i in range(len(captions))]
    return _spread(images, per_scene) / _spread(np.stack(drawn), per_scene)


def _spread(images: np.ndarray, per_scene: int) -> float:
    # (scenes * n, h, w, 3) → (scenes, n, h w 3)
    x = images.reshape(-1, per_scene, np.prod(images.shape[1:])).astype(np.float64)
    # (scenes, n, n) distances; the diagonal is 0 and is not counted in the mean.
    apart = np.linalg.norm(x[:, :, None] - x[:, None], axis=-1)
    return float(apart.sum() / (len(x) * per_scene * (per_scene - 1)))
