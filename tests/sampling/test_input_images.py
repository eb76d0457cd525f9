"""Pictures, masks and latents of callers: what is taken, and each that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from sd3_jax.data import images as files
from sd3_jax.errors import UserError
from sd3_jax.sampling.images import input_images

DRAW = np.random.default_rng(0)
BYTES = DRAW.integers(0, 256, (2, 24, 32, 3), np.uint8)
FLOATS = BYTES.astype(np.float32) / 255
RGBA = DRAW.integers(0, 256, (24, 32, 4), np.uint8)
MASK = DRAW.integers(0, 256, (2, 24, 32, 1), np.uint8)
LATENTS = DRAW.standard_normal((2, 3, 4, 16)).astype(np.float32)
pil = Image.fromarray
grey = lambda x: pil(x[..., 0])


@pytest.mark.parametrize(
    "given",
    [
        FLOATS,
        BYTES,
        jnp.asarray(BYTES),
        torch.tensor(BYTES),
        FLOATS.astype(np.float64),
        list(BYTES),
        [pil(x) for x in BYTES],
        tuple(map(jnp.asarray, BYTES)),
    ],
)
def test_a_batch_of_pictures(given):
    found = input_images.pixels(given)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, FLOATS, atol=1e-7)


@pytest.mark.parametrize("given", [BYTES[0], FLOATS[0], pil(BYTES[0]), [BYTES[0]]])
def test_one_picture_is_a_batch_of_one(given):
    np.testing.assert_allclose(input_images.pixels(given), FLOATS[:1], atol=1e-7)


def modes():
    palette = pil(BYTES[0]).convert("P")
    sixteen = pil(DRAW.integers(0, 2**16, (24, 32), np.uint16))
    turned = pil(BYTES[0])
    turned.getexif()[0x0112] = 6
    converted = [pil(RGBA).convert(mode) for mode in ("1", "L", "LA", "CMYK", "YCbCr")]
    return [palette, sixteen, turned, pil(RGBA), *converted]


@pytest.mark.parametrize("picture", modes(), ids=lambda x: x.mode)
def test_pil_images_are_what_the_data_path_makes_of_them(picture):
    wanted = files.pixels(picture)[None].astype(np.float32) / 255
    np.testing.assert_array_equal(input_images.pixels(picture), wanted)


def test_alpha_of_arrays_is_over_white_as_of_pictures():
    wanted = files.pixels(pil(RGBA)).astype(np.float32) / 255
    for given in (RGBA, RGBA.astype(np.float32) / 255, jnp.asarray(RGBA)):
        np.testing.assert_allclose(input_images.pixels(given)[0], wanted, atol=1 / 255)


def test_grey_is_rgb():
    wanted = np.repeat(FLOATS[:1, ..., :1], 3, -1)
    for given in (BYTES[0, ..., 0], BYTES[0, ..., :1], BYTES[:1, ..., :1]):
        np.testing.assert_array_equal(input_images.pixels(given), wanted)


def test_a_step_of_bfloat16_beyond_the_range_is_clipped():
    given = jnp.asarray([1 + 2**-7, -(2**-8), 0.5], jnp.bfloat16)
    found = input_images.pixels(jnp.broadcast_to(given, (8, 8, 3)))
    np.testing.assert_array_equal(found[0, 0, 0], [1.0, 0.0, 0.5])


def test_values_that_are_traced_are_not_looked_at():
    found = jax.jit(input_images.pixels)(3 * FLOATS)
    np.testing.assert_array_equal(found, np.clip(3 * FLOATS, 0, 1))


ANIMATED = Image.new("RGB", (8, 8))
ANIMATED.is_animated = True


@pytest.mark.parametrize(
    "given, said",
    [
        (BYTES.astype(np.float32), "floats from 0 to 255; expected 0 to 1: x / 255"),
        (
            2 * FLOATS - 1,
            "floats from -1 to 1; expected 0 to 1: x / 255 of 0 to 255, (x",
        ),
        (1.02 * FLOATS, "floats from 0 to 1.02; expected 0 to 1"),
        (np.where(FLOATS > 0.5, np.nan, FLOATS), "NaN or infinite"),
        (BYTES.astype(np.int64), "dtype int64: expected uint8"),
        (BYTES.astype(np.uint16), "dtype uint16: expected uint8"),
        (BYTES.transpose(0, 3, 1, 2), "channels come last here, x.transpose(0, 2, 3,"),
        (torch.tensor(BYTES[0]).permute(2, 0, 1), "last here, x.transpose(1, 2, 0)"),
        (
            BYTES[..., 0],
            "shape (2, 24, 32): expected (b, H, W, 3), (H, W, 3) or (H, W)",
        ),
        (BYTES[..., :2], "shape (2, 24, 32, 2): expected"),
        (BYTES[:0], "shape (0, 24, 32, 3): expected"),
        (BYTES[0, 0, 0, 0], "shape (): expected"),
        (
            "fox.png",
            "'fox.png': expected an array or a PIL image; for a file, pass PIL.Ima",
        ),
        ([], "an empty list"),
        ([BYTES[0], BYTES[0, :8]], "expected all of one size and dtype"),
        ([BYTES[0], "fox.png"], "image 1: 'fox.png'"),
        (Image.new("F", (8, 8)), 'of mode F: pass x.convert("RGB")'),
        (ANIMATED, "animated; pass one frame"),
        (torch.zeros(8, 8, 3, dtype=torch.bfloat16), "not a NumPy array"),
    ],
)
def test_pictures_that_are_refused(given, said):
    refused(input_images.pixels, given, said)


def refused(function, given, said, *rest):
    with pytest.raises(UserError) as caught:
        function(given, *rest)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        MASK,
        MASK[..., 0],
        jnp.asarray(MASK),
        MASK / 255,
        [grey(x) for x in MASK],
        [x[..., 0] for x in MASK],
    ],
)
def test_masks(given):
    np.testing.assert_allclose(input_images.mask(given), MASK / 255, atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [MASK[0] > 127, MASK[0, ..., 0] > 127, pil(MASK[0, ..., 0] > 127)],
)
def test_masks_of_one_bit(given):
    np.testing.assert_array_equal(input_images.mask(given)[0], MASK[0] > 127)


@pytest.mark.parametrize(
    "given, said",
    [
        (MASK.astype(np.float32), "floats from 0 to 255; expected 0 to 1"),
        (2.0 * MASK / 255 - 1, "floats from -1 to 1"),
        (MASK * np.nan, "NaN or infinite"),
        (
            (MASK > 127).astype(np.uint8),
            "bytes of 0 and 1, but 255 stands for 1; pass x.astype(bool)",
        ),
        ((MASK > 127).astype(np.int64), "dtype int64"),
        (MASK.transpose(0, 3, 1, 2), "x.transpose(0, 2, 3, 1)"),
        (BYTES, "shape (2, 24, 32, 3): expected (b, H, W, 1), (b, H, W) or (H, W)"),
        (pil(BYTES[0]), 'of mode RGB: expected "1" or "L"'),
        (pil(RGBA), 'mask.getchannel("A")'),
    ],
)
def test_masks_that_are_refused(given, said):
    refused(input_images.mask, given, said)


def test_latents():
    for given in (LATENTS, jnp.asarray(LATENTS), torch.tensor(LATENTS)):
        np.testing.assert_array_equal(input_images.latents(given, 16), LATENTS)
    np.testing.assert_array_equal(input_images.latents(LATENTS[0], 16), LATENTS[:1])


@pytest.mark.parametrize(
    "given, said",
    [
        (LATENTS.transpose(0, 3, 1, 2), "last here, x.transpose(0, 2, 3, 1)"),
        (LATENTS[0].transpose(2, 0, 1), "last here, x.transpose(1, 2, 0)"),
        (LATENTS[..., :4], "shape (2, 3, 4, 4): expected (b, h, w, 16)"),
        (LATENTS * np.inf, "NaN or infinite"),
        (LATENTS.astype(np.int32), "dtype int32: expected floats"),
        (7, "7: expected an array"),
    ],
)
def test_latents_that_are_refused(given, said):
    refused(input_images.latents, given, said, 16)
