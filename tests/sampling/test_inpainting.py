"""Masks that grow and blur, crops, borders and pasting, against diffusers' own."""

import jax
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from parity import miniature
from PIL import Image

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling.images import inpainting, mask_shapes
from sd3_jax.sampling.text.prompts import Conditioning

DRAW = np.random.default_rng(0)
PHOTO = DRAW.integers(0, 256, (48, 64, 3), np.uint8)
MASK = np.zeros((48, 64), np.uint8)
MASK[16:32, 24:48] = 255
QUICK = dict(steps=2, guidance=1.0, strength=1.0)
theirs = VaeImageProcessor()


@pytest.fixture(scope="module")
def bundle():
    """The denoiser and the autoencoder on one device."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    folder = str(miniature.folder("sd35_medium"))
    return sd3_jax.load(folder, mesh, "float32", only=("denoiser", "vae"))


@pytest.fixture(scope="module")
def text(bundle):
    config, draw = bundle.configs["denoiser"], np.random.default_rng(1)
    shapes = (
        (1, 93, config["joint_attention_dim"]),
        (1, config["pooled_projection_dim"]),
    )
    return Conditioning(*(draw.standard_normal(s).astype(np.float32) for s in shapes))


@pytest.fixture(scope="module")
def paint(bundle, text):
    def paint(image=PHOTO, mask=MASK, prompts=text, **options):
        images = sd3_jax.generate(
            bundle, prompts, image=image, mask=mask, **QUICK | options
        )
        return np.rint(255 * np.asarray(images, np.float32)).astype(np.uint8)

    return paint


def test_unmasked_pixels_are_pasted_back_bit_for_bit(paint):
    plain, pasted = paint(), paint(paste=True)
    outside = MASK == 0
    assert (plain[0][outside] != PHOTO[outside]).any()  # through the autoencoder
    np.testing.assert_array_equal(pasted[0][outside], PHOTO[outside])
    np.testing.assert_array_equal(pasted[0][~outside], plain[0][~outside])


def test_blur_and_padding_move_the_edge_and_no_pixel_beyond(paint):
    weight = mask_shapes.blurred(mask_shapes.dilated(MASK, 3), 2)
    out = paint(paste=True, mask_blur=2, mask_padding=3)[0]
    np.testing.assert_array_equal(out[weight == 0], PHOTO[weight == 0])
    assert (out[weight == 255] != PHOTO[weight == 255]).any()
    grown = np.flatnonzero(mask_shapes.dilated(MASK, 3).any(0))
    assert (grown[0], grown[-1]) == (21, 50)


def test_the_blur_is_diffusers():
    for radius in (1, 2.5, 8):
        wanted = theirs.blur(Image.fromarray(MASK), radius)
        np.testing.assert_array_equal(mask_shapes.blurred(MASK, radius), wanted)


@pytest.mark.parametrize("seed", range(40))
def test_the_region_of_a_crop_is_diffusers(seed):
    draw = np.random.default_rng(seed)
    h, w = draw.integers(8, 90, 2)
    mask = np.zeros((h, w), np.uint8)
    (y, y2), (x, x2) = (sorted(draw.choice(n + 1, 2, replace=False)) for n in (h, w))
    mask[y:y2, x:x2] = draw.integers(1, 256)
    sides, padding = [int(x) for x in draw.integers(16, 128, 2)], int(draw.integers(20))
    wanted = theirs.get_crop_region(Image.fromarray(mask), *sides, pad=padding)
    assert mask_shapes.crop_region(mask, *sides, padding) == wanted


def test_the_overlay_is_diffusers():
    """To a level of its alpha of eight bits."""
    weight = mask_shapes.blurred(MASK, 3)
    painted = DRAW.integers(0, 256, (32, 32, 3), np.uint8)
    region = mask_shapes.crop_region(weight, 32, 32, 4)
    edit = inpainting.Edit(
        image=PHOTO[None] / np.float32(255),
        mask=MASK[None, ..., None] / np.float32(255),
        original=PHOTO[None] / np.float32(255),
        weight=weight[None, ..., None] / np.float32(255),
        pastes=True,
        regions=[region],
        insides=[(0, 0, 32, 32)],
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    ours = edit.finish(jax.numpy.asarray(painted[None] / np.float32(255)), mesh)[0]
    pil = Image.fromarray
    wanted = theirs.apply_overlay(pil(weight), pil(PHOTO), pil(painted), region)
    error = np.abs(255 * np.asarray(ours) - np.asarray(wanted, np.float32))
    assert error.max() <= 1.5, error.max()
    np.testing.assert_array_equal(np.asarray(wanted)[weight == 0], PHOTO[weight == 0])


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_a_crop_fills_the_generated_size_as_diffusers(shape):
    pixels = DRAW.integers(0, 256, (*shape, 3), np.uint8)
    filled, inside = mask_shapes.filled(pixels, 64, 64)
    wanted = theirs.resize(Image.fromarray(pixels), 64, 64, resize_mode="fill")
    left, top, right, bottom = inside
    area = np.s_[top:bottom, left:right]
    # The margin is only there to be cut off again; theirs is a blend of edge rows.
    np.testing.assert_array_equal(filled[area], np.asarray(wanted)[area])
    assert (filled[0] == filled[top]).all() and (filled[:, 0] == filled[:, left]).all()
    assert (bottom - top) / (right - left) == shape[0] / shape[1]


def test_a_crop_is_painted_at_the_size_that_is_generated(paint):
    """The photograph has any size; a small mask gets all of the model's pixels."""
    photo = DRAW.integers(0, 256, (75, 101, 3), np.uint8)
    mask = np.zeros((75, 101), bool)
    mask[50:60, 80:99] = True
    out = paint(photo, mask, crop_to_mask=4, height=48, width=64)
    assert out.shape == (1, 75, 101, 3)
    np.testing.assert_array_equal(out[0][~mask], photo[~mask])
    assert (out[0][mask] != photo[mask]).mean() > 0.9


def test_outpainting_adds_a_border_and_paints_all_of_it(paint):
    border = (8, 4, 8, 12)
    out = paint(mask=None, outpaint=border, paste=True)[0]
    assert out.shape == (64, 80, 3)
    np.testing.assert_array_equal(out[4:52, 8:72], PHOTO)
    # Without the model, the border would repeat the edge. The last four rows are
    # latents that begin inside of the picture.
    for rows in (np.s_[:4], np.s_[52:56], np.s_[60:]):
        edge = PHOTO[0 if rows == np.s_[:4] else -1]
        assert (out[rows, 8:72] != edge).mean() > 0.9


def test_pictures_of_a_batch_have_their_own_masks(paint, text):
    photos = DRAW.integers(0, 256, (2, 48, 64, 3), np.uint8)
    masks = np.stack([MASK, np.roll(MASK, 16, 0)])
    one = [
        paint(photos[i], masks[i], crop_to_mask=2, height=32, width=48, seed=[0])
        for i in (0, 1)
    ]
    two = jax.tree.map(lambda x: x.repeat(2, 0), text)
    both = paint(
        photos,
        masks,
        prompts=two,
        crop_to_mask=2,
        height=32,
        width=48,
        seed=[0, 0],
    )
    for i in (0, 1):
        assert np.abs(both[i].astype(int) - one[i][0]).max() <= 1
        outside = masks[i] == 0
        np.testing.assert_array_equal(both[i][outside], photos[i][outside])


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(paste=True, image=None, mask=None), "paste without image; give image"),
        (dict(paste=True, mask=None), "paste without mask; give mask, white where"),
        (dict(mask_blur=3), "mask_blur 3 without paste"),
        (
            dict(mask_blur=-1, paste=True),
            "mask_blur -1: expected a number in [0, 4096]",
        ),
        (dict(mask_padding=1.5), "mask_padding 1.5: expected a whole number 0 to 4096"),
        (dict(crop_to_mask=-1), "crop_to_mask -1: expected a whole number"),
        (dict(outpaint=(8, 8)), "outpaint (8, 8): expected four numbers of pixels"),
        (dict(outpaint=(0, 0, 0, 0)), "expected a border on one side at least"),
        (
            dict(outpaint=(8, 0, 1, 0)),
            "border has 48 x 73 pixels; expected multiples of 16; set outpaint to 8, 0,"
            " 8, 0",
        ),
        (dict(paste=True, mask=MASK[:16]), "mask of (16, 64) pixels: must equal"),
        (dict(crop_to_mask=0, mask=0 * MASK), "mask 0 is black"),
        (dict(paste=True, output="latents"), "pixels are pasted; use output"),
        (dict(paste=True, image=np.zeros((6, 8, 16), np.float32)), "expected pixels"),
    ],
)
def test_mistakes_are_one_line(paint, options, words):
    with pytest.raises(UserError) as caught:
        paint(**options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_repainted_is_not_the_autoencoders_copy(paint, caplog):
    """A mask below 0.5 repaints no latent."""
    grey = np.full_like(MASK, 100)
    for options in {}, {"mask_blur": 2}, {"crop_to_mask": 4, "height": 48, "width": 64}:
        out = paint(mask=grey, paste=True, **options)[0]
        np.testing.assert_array_equal(out, PHOTO)
        assert "these pictures are not repainted" in caplog.text
    # A feathered edge acts within the latents that are repainted.
    mixed = np.where(MASK > 0, MASK, 100).astype(np.uint8)
    out = paint(mask=mixed, paste=True)[0]
    np.testing.assert_array_equal(out[MASK == 0], PHOTO[MASK == 0])
    assert (out[MASK > 0] != PHOTO[MASK > 0]).any()
