"""A mark that nobody sees, that survives what pictures go through."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sd3_jax.sampling.images import watermark

TEXT = "sd3 by someone!!"  # of the most bytes


def scaled(image, width, height):
    size = width, height
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


@pytest.fixture(scope="module")
def photo():
    return load_sample_images().images[0]


def pictures(photo):
    flat = np.zeros((256, 300, 3), np.uint8)
    return [
        scaled(photo, 640, 512),  # on the fine grid
        scaled(photo, 256, 384),  # on the coarse one
        flat,
        flat + np.array([255, 0, 0], np.uint8),  # half of every change is clipped
        flat + np.uint8(255),
    ]


def test_marks_survive_compression_and_scaling_unseen(photo):
    for image in pictures(photo):
        marked = watermark.embed(image, TEXT)
        assert psnr(image, marked) >= 38
        h, w = image.shape[:2]
        assert watermark.read(marked) == TEXT
        for quality in (90, 75, 50):
            assert watermark.read(jpeg(marked, quality)) == TEXT, (h, w, quality)
        for factor in (0.75, 1.3):
            other = scaled(marked, int(factor * w), int(factor * h))
            assert watermark.read(other) == TEXT, (h, w, factor)
        assert watermark.read(scaled(marked, w, h + w // 4)) == TEXT  # another aspect


def test_unmarked_pictures_have_none(photo):
    rng = np.random.default_rng(0)
    for image in (*pictures(photo), rng.integers(0, 256, (300, 400, 3), np.uint8)):
        assert watermark.read(image) is None
    half = watermark.embed(scaled(photo, 512, 512), TEXT)[:, :256]  # a crop is another
    assert watermark.read(half) is None


def test_a_second_mark_takes_the_first_ones_place(photo):
    image = scaled(photo, 512, 512)
    twice = watermark.embed(watermark.embed(image, "the first"), "ü")
    assert watermark.read(twice) == "ü"


def test_a_mark_is_a_function_of_the_text_for_good(photo):
    """Readers of another version must find it: these are chips of a hash."""
    bits, chips = watermark._chips(128)
    assert bits[:8].tolist() == [63, 45, 22, 77, 142, 2, 149, 14]
    assert (chips[:8] > 0).tolist() == [
        True,
        False,
        True,
        True,
        False,
        True,
        False,
        False,
    ]
    assert np.bincount(bits).min() >= len(bits) // watermark.FRAME


@pytest.mark.parametrize("text", ["", "seventeen letters", "sixteen ümläüte", "a\nb"])
def test_what_does_not_fit_is_refused(text):
    assert not watermark.fits(text)
    with pytest.raises(ValueError, match="expected 1 to 16 bytes of text that prints"):
        watermark.embed(np.zeros((256, 256, 3), np.uint8), text)


def test_small_pictures_are_refused(photo):
    with pytest.raises(
        ValueError, match="640 x 255 pixels; a watermark needs sides of 256"
    ):
        watermark.embed(photo[:255], TEXT)
    assert watermark.read(photo[:100, :90]) is None  # may be read, and have none


def test_the_command_tells_each_picture(tmp_path, photo, capsys):
    marked, plain = tmp_path / "marked.jpg", tmp_path / "plain.png"
    image = watermark.embed(scaled(photo, 320, 256), TEXT)
    Image.fromarray(image).save(marked, quality=90)
    Image.fromarray(photo).save(plain)
    assert watermark.main([str(marked)]) == 0
    assert watermark.main([str(marked), str(plain)]) == 1
    assert watermark.main([str(tmp_path / "none.png")]) == 2
    said = capsys.readouterr()
    assert f"{marked}: {TEXT}" in said.out and f"{plain}: no mark" in said.out
    assert "cannot be read" in said.err
