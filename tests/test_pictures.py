"""Pixels, sheets and files."""

import io

import numpy as np
import pytest
from PIL import Image

from sd3_jax.pictures import enlarged, grid, save_png, to_uint8


def test_rounding_is_to_the_nearest_and_halves_to_even():
    pixels = np.array([0.5, 1.5, 2.5, 127.4, 127.6], np.float32)
    images = (pixels - 127.5) / 127.5
    np.testing.assert_array_equal(to_uint8(images), [0, 2, 2, 127, 128])
    np.testing.assert_array_equal(
        to_uint8(np.array([-9.0, -1, 1, 9, np.inf])), [0, 0, 255, 255, 255]
    )


def test_every_byte_comes_back():
    pixels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(pixels / np.float32(127.5) - 1), pixels)


def test_nan_is_an_error_and_no_black_picture():
    with pytest.raises(ValueError, match="50.0% of the pixels are NaN"):
        to_uint8(np.array([0.0, np.nan]))


@pytest.mark.parametrize(
    "size, tile", [(8, 96), (16, 96), (28, 112), (64, 128), (256, 256)]
)
def test_tiny_images_grow_by_a_whole_factor(size, tile):
    images = np.random.default_rng(0).integers(0, 256, (5, size, size, 3), np.uint8)
    sheet = np.asarray(grid(images, columns=3))
    gap = max(tile // 12, 8)
    gap = min(gap, 24)
    assert sheet.shape == (gap + 2 * (tile + gap), gap + 3 * (tile + gap), 3)
    last = sheet[2 * gap + tile : -gap, 2 * gap + tile :][
        :tile, :tile
    ]  # row 1, column 1
    np.testing.assert_array_equal(last[:: tile // size, :: tile // size], images[4])


def test_large_sheets_shrink():
    images = np.zeros((32, 1024, 1024, 3), np.uint8)
    assert grid(images, columns=16).width < 16 * (256 + 25) + 25
    assert grid(images[:2], columns=2).width > 2048


def test_captions_take_room_and_ink_and_stay_within_their_tile():
    images = np.full((2, 8, 8, 3), 255, np.uint8)
    plain, captioned = (
        grid(images),
        grid(images, captions=["", "wordwithoutend" * 99_000]),
    )
    assert captioned.height > plain.height
    ink = np.argwhere(np.asarray(captioned).min(-1) < 128)
    assert ink[:, 1].min() >= 8 + 96 + 8 - 1 and ink[:, 1].max() <= captioned.width - 7
    assert ink[:, 0].max() < captioned.height - 4
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        grid(images, captions=["one"])


def test_png_keeps_pixels_and_info(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    save_png(image, tmp_path / "new" / "a.png", info={"prompt": "naïve ☃", "seed": "7"})
    with Image.open(tmp_path / "new" / "a.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), image)
        assert picture.text == {"prompt": "naïve ☃", "seed": "7"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_an_empty_sheet_is_a_picture():
    buffer = io.BytesIO()
    grid(np.zeros((0, 8, 8, 3), np.uint8)).save(buffer, "png")


def test_tiny_images_grow_whole():
    image = np.arange(8 * 10 * 3, dtype=np.uint8).reshape(8, 10, 3)
    grown = np.asarray(enlarged(image))
    assert grown.shape == (96, 120, 3)
    np.testing.assert_array_equal(grown[::12, ::12], image)
    large = np.zeros((200, 100, 3), np.uint8)
    assert enlarged(large).size == (100, 200)
