"""Shapes of about one area, pictures cut to them, and whose turn a step is."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd3_jax.data import buckets
from sd3_jax.data.buckets import Bucket, Turns

quick = settings(deadline=None, database=None, derandomize=True, max_examples=100)


@pytest.mark.parametrize("side", [256, 512, 1024, 1440])
@pytest.mark.parametrize("count, aspect", [(5, 2.0), (9, 2.0), (17, 4.0)])
def test_shapes_have_about_the_squares_area(side, count, aspect):
    found = buckets.table(side, side, count=count, aspect=aspect)
    assert len(found) == count and found[count // 2] == (side, side)
    for i, (h, w) in enumerate(found):
        assert h % 16 == w % 16 == 0
        assert 0.87 * side**2 <= h * w <= side**2  # no more tokens than the square
        assert math.isclose(w / h, aspect ** (2 * i / (count - 1) - 1), rel_tol=0.1)
        assert found[-1 - i] == (w, h)


def test_one_shape_is_the_given_one():
    assert buckets.table(48, 80) == ((48, 80),)
    assert str(Bucket(48, 80)) == "48x80"


def test_small_tables_hold_no_shape_twice():
    found = buckets.table(32, 32, count=33, aspect=4.0)
    assert len(set(found)) == len(found) < 33


@quick
@given(st.integers(16, 3000), st.integers(16, 3000))
def test_a_crop_fills_its_bucket_and_lies_in_the_middle(height, width):
    shapes = buckets.table(256, 256, count=9)
    found = buckets.fit(height, width, shapes)
    top, left, h, w = found.crop
    assert 0 <= top and 0 <= left and top + h <= height and left + w <= width
    assert abs(height - h - 2 * top) <= 1 and abs(width - w - 2 * left) <= 1
    assert h == height or w == width  # only one side is cut
    assert math.isclose(found.kept, h * w / height / width)
    sides = found.bucket
    assert abs(w * sides.height / sides.width - h) <= max(1, sides.height / sides.width)
    distance = lambda b: abs(math.log(b.width / b.height) - math.log(width / height))
    assert distance(sides) == min(map(distance, shapes))


def test_what_is_cut_is_the_middle():
    picture = np.zeros((100, 300, 3), np.uint8)
    picture[:, 100:200] = 255
    found = buckets.fit(100, 300, [Bucket(64, 64)])
    assert found.crop == (0, 100, 100, 100) and math.isclose(found.enlarged, 0.64)
    made = buckets.cut(picture, found)
    assert (made[:, 3:-3] == 255).all() and made.min() > 200  # sides: half of each
    same = buckets.fit(64, 64, [Bucket(64, 64)])
    assert (buckets.cut(picture[:64, :64], same) == picture[:64, :64]).all()


def test_reduction_is_antialiased():
    lines = np.zeros((128, 128, 3), np.uint8)
    lines[::2] = 255  # finer than the result can show
    made = buckets.cut(lines, buckets.fit(128, 128, [Bucket(32, 32)]))
    assert abs(made[4:-4].astype(int) - 127).max() < 12
    theirs = Image.fromarray(lines).resize((32, 32), Image.Resampling.LANCZOS)
    assert (made == np.asarray(theirs)).all()


weights = st.lists(st.integers(1, 1000) | st.floats(0.01, 100), min_size=1, max_size=9)


@quick
@given(weights, st.integers(0, 2**32 - 1), st.integers(0, 10**9))
def test_a_place_counts_the_earlier_steps(given, seed, start):
    turns = Turns(given, seed)
    seen = {}
    for step in range(start, start + 50):
        bucket, before = turns.place(step)
        assert before == seen.setdefault(bucket, before)
        seen[bucket] = before + 1
    assert Turns(given, seed).place(start) == turns.place(start)


@quick
@given(weights, st.integers(0, 2**32 - 1))
def test_every_bucket_has_its_share_of_any_stretch(given, seed):
    turns, total = Turns(given, seed), sum(given)
    drawn = [turns.place(step) for step in range(400)]
    for start in (0, 137):
        counts = Counter(bucket for bucket, _ in drawn[start : start + 200])
        for bucket, weight in enumerate(given):
            assert abs(counts[bucket] - 200 * weight / total) < 6
    for bucket in range(len(given)):
        assert [n for k, n in drawn if k == bucket] == list(
            range(sum(k == bucket for k, _ in drawn))
        )


def test_another_seed_is_another_order():
    order = lambda seed: tuple(Turns([1, 2, 1], seed).place(s) for s in range(9))
    assert len(set(map(order, range(20)))) > 10
