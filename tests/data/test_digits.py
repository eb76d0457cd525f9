"""The embedded set: what is held out stays out, and example i is always the same."""

import collections
import functools

import numpy as np
import pytest

from sd3_jax.data import digits, tokenizers
from sd3_jax.data.digits import Digits, Scene, Thing, parse, split_of
from sd3_jax.data.loader import Loader


@pytest.mark.parametrize(
    "caption, scene",
    [
        ("a red seven", Scene("single", (Thing("red", 7),))),
        (
            "a red seven left of a blue three",
            Scene("pair", (Thing("red", 7), Thing("blue", 3)), "left of"),
        ),
        (
            'the number "42" in green',
            Scene("number", (Thing("green", 4), Thing("green", 2))),
        ),
    ],
)
def test_captions_read_as_they_are_written(caption, scene):
    assert parse(caption) == scene
    assert str(scene) == caption


@pytest.mark.parametrize("text", ["", "a seven", "a red seven near a blue three", "42"])
def test_other_captions_are_no_scene(text):
    assert parse(text) is None


def test_a_picture_has_one_split_however_it_is_told():
    mirror = {"left of": "right of", "right of": "left of", "above": "below"}
    mirror["below"] = "above"
    for split in digits.SPLITS:
        for scene in digits.scenes("pair", split):
            other = Scene("pair", scene.things[::-1], mirror[scene.relation])
            assert split_of(other) == split


def test_splits_are_a_tenth_each_and_whole():
    pairs = {split: len(digits.scenes("pair", split)) for split in digits.SPLITS}
    assert pairs == {"train": 11_520, "tune": 1_440, "test": 1_440}
    numbers = {split: len(digits.scenes("number", split)) for split in digits.SPLITS}
    assert numbers == {"train": 480, "tune": 60, "test": 60}


def test_training_never_shows_what_is_held_out():
    captions = Digits(16, 16).batch(np.arange(20_000))["caption"]
    assert {split_of(parse(caption)) for caption in captions} == {"train"}
    kinds = collections.Counter(parse(caption).kind for caption in captions)
    shares = [kinds[kind] / len(captions) for kind in digits.KINDS]
    np.testing.assert_allclose(shares, (0.2, 0.5, 0.3), atol=0.02)


def test_scans_held_out_are_other_scans():
    train, held = digits.scans(False)[0], digits.scans(True)[0]
    assert len(train) + len(held) == 1_797 and len(held) == 360
    alike = (train[:, None].reshape(len(train), 1, -1) == held.reshape(1, 360, -1)).all(
        -1
    )
    assert not alike.any()


def test_an_example_is_a_function_of_seed_and_index():
    canvas = Digits(16, 16)
    whole, part = canvas.batch(np.arange(40)), canvas.batch(np.array([17, 31]))
    np.testing.assert_array_equal(whole["image"][[17, 31]], part["image"])
    assert [whole["caption"][i] for i in (17, 31)] == part["caption"]
    other = Digits(16, 16, seed=1).batch(np.arange(40))
    assert (whole["image"] != other["image"]).any()


def test_the_picture_is_what_the_caption_says():
    batch = Digits(16, 16, mix=(0.0, 1.0, 0.0)).batch(np.arange(200))
    for caption, image in zip(batch["caption"], batch["image"]):
        scene = parse(caption)
        (first, second), axis = scene.placed()
        for half, thing in zip(
            np.split(image, 2, axis=0 if axis == "y" else 1), scene.placed()[0]
        ):
            ink = half.reshape(-1, 3).max(0) > 0
            assert tuple(ink) == tuple(c > 0 for c in digits.COLOURS[thing.colour])


def load(start=0, rows=tuple(range(8)), threads=2):
    return Loader(
        Digits(16, 16),
        batch_size=8,
        rows=np.array(rows),
        tokenize=functools.partial(tokenizers.bytes_of, length=42),
        start=start,
        threads=threads,
    )


def test_a_loader_starts_anywhere_and_threads_do_not_matter():
    straight = load()
    batches = [next(straight) for _ in range(6)]
    for start, threads in [(3, 0), (5, 4)]:
        batch = next(load(start=start, threads=threads))
        for name in ("image", "ids_bytes"):
            np.testing.assert_array_equal(batch[name], batches[start][name])


def test_processes_share_a_batch_between_them():
    whole = next(load())
    halves = [next(load(rows=rows)) for rows in np.split(np.arange(8), 2)]
    for name in ("image", "ids_bytes"):
        both = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(both, whole[name])
