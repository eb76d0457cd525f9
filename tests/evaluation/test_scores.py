"""The scorer reads real pictures, and is not fooled by wrong ones."""

import numpy as np
import pytest

from sd3_jax.data.digits import Digits, parse
from sd3_jax.evaluation import digit_scenes
from sd3_jax.evaluation.digit_reader import detect, matches


def test_it_reads_held_out_scans():
    whole = digit_scenes.read_scans(8, 8)
    assert whole.n == 360 and whole.score >= 0.98
    assert digit_scenes.ceiling(16, 16, "pair", 1_000).score >= 0.93  # two to read
    assert digit_scenes.ceiling(16, 16, "number", 1_000).score >= 0.93


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("a red seven", ["a red one", "a blue seven"]),
        (
            "a red seven left of a blue three",
            [
                "a red seven right of a blue three",
                "a red seven above a blue three",
                "a blue seven left of a red three",
                "a red three left of a blue seven",
                "a red seven",
            ],
        ),
        (
            'the number "42" in green',
            ['the number "24" in green', 'the number "42" in red'],
        ),
    ],
)
def test_only_the_right_picture_matches(right, wrong):
    scene = parse(right)
    u = np.array([0.11, 0.52])
    image = Digits(16, 16).draw(scene, u)
    assert matches(scene, image)
    for caption in wrong:
        assert not matches(parse(caption), image), caption
        other = Digits(16, 16).draw(parse(caption), u)
        assert not matches(scene, other), caption


def test_an_empty_picture_shows_nothing():
    assert detect(np.zeros((16, 16, 3), np.uint8)) == []
    assert not matches(parse("a red one"), np.zeros((16, 16, 3), np.uint8))


def test_the_score_has_wilson_bounds():
    s = digit_scenes.score("x", [True] * 8 + [False] * 2)
    assert (s.score, s.n) == (0.8, 10)
    np.testing.assert_allclose((s.low, s.high), (0.490, 0.943), atol=1e-3)
    # Exactly: the report's bar is left out where a bound is outside [0, 1].
    assert digit_scenes.score("x", [False] * 8).low == 0
    assert digit_scenes.score("x", [True] * 8).high == 1


def test_variety_is_one_for_real_pictures_and_nothing_for_copies():
    scenes = digit_scenes.sample_scenes("single", "train", 12)
    canvas = Digits(16, 16, held_out=False)
    rng = np.random.default_rng(0)
    real = lambda captions, numbers: np.stack(
        [canvas.draw(parse(c), rng.random(2)) for c in captions]
    )
    copies = lambda captions, numbers: np.stack(
        [canvas.draw(parse(c), np.full(2, 0.5)) for c in captions]
    )
    assert abs(digit_scenes.variety(real, scenes) - 1) < 0.15
    assert digit_scenes.variety(copies, scenes) == 0
