"""The autoencoder by tiles against diffusers', with random weights, in float32."""

import functools

import jax
import numpy as np
import pytest
import torch
from parity import convert, miniature
from parity.test_vae import SIZES, nchw, nhwc, variables

from sd3_jax import sharding
from sd3_jax.models import vae
from sd3_jax.pipelines import tiles
from sd3_jax.pipelines.bundle import Bundle

# In latents. Tiles are 8 wide, one every 6: of 13 the last is 1 and that before it 7.
SHAPES = {"both": (15, 14), "down": (13, 5), "across": (7, 9), "one tile": (8, 7)}


@pytest.fixture(scope="module")
def theirs():
    model = miniature.vae().eval()
    model.enable_tiling()
    return model


@pytest.fixture(scope="module")
def bundle(theirs):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = vae.VAE(**SIZES), variables(theirs), dict(theirs.config)
    return Bundle(*({"vae": part} for part in parts), {}, mesh, "float32")


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


def draw(shape, channels, factor=1):
    height, width = shape
    shape = 2, factor * height, factor * width, channels
    return jax.random.uniform(jax.random.key(sum(shape)), shape, minval=-1)


@functools.partial(jax.jit, static_argnames=("module", "method"))
def ours(module, weights, x, method):
    run = functools.partial(module.apply, weights, method=method)
    return getattr(tiles, method)(run, x, tile=64, factor=8)


@torch.no_grad()
def test_the_moments(theirs, bundle, shape):
    x = draw(shape, 3, factor=8)
    wanted = nhwc(theirs.encode(nchw(x)).latent_dist.parameters)
    got = ours(bundle.modules["vae"], bundle.variables["vae"], x, "encode")
    assert convert.error(got, wanted) < 2e-5


@torch.no_grad()
def test_the_decoded_image(theirs, bundle, shape):
    z = draw(shape, 16)
    wanted = nhwc(theirs.decode(nchw(z)).sample)
    got = ours(bundle.modules["vae"], bundle.variables["vae"], z, "decode")
    assert convert.error(got, wanted) < 2e-5


@torch.no_grad()
def test_the_latents_of_a_bundle(theirs, bundle):
    images = (draw((7, 9), 3, factor=8) + 1) / 2
    mean = nhwc(theirs.encode(nchw(2 * images - 1)).latent_dist.mean)
    wanted = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert convert.error(bundle.encode_image(images, tile=64), wanted) < 2e-5
    assert convert.error(bundle.encode_image(images), wanted) > 1e-2


@torch.no_grad()
def test_the_images_of_a_bundle(theirs, bundle):
    x0 = draw((7, 9), 16)
    z = x0 / theirs.config.scaling_factor + theirs.config.shift_factor
    wanted = nhwc(theirs.decode(nchw(z)).sample / 2 + 0.5).clip(0, 1)
    assert convert.error(bundle.decode(x0, tile=64), wanted) < 2e-5
    assert convert.error(bundle.decode(x0), wanted) > 1e-2


@pytest.mark.parametrize("overlap", [0, 0.3, 0.75])
def test_what_is_the_same_everywhere_stays_so(overlap):
    """By tiles of ten latents, of which the overlap is none, three or seven."""
    x = np.ones((1, 23, 31, 2)) * [1.0, 2.0]
    big = lambda z: z[..., :1].repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    y = tiles.decode(big, jax.numpy.asarray(x), tile=40, factor=4, overlap=overlap)
    np.testing.assert_allclose(y, np.ones((1, 92, 124, 3)), rtol=1e-6)


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_tiles_that_cannot_be(bundle, method):
    run = functools.partial(getattr(tiles, method), None, draw((16, 16), 3), factor=8)
    with pytest.raises(ValueError, match="^tile 100: wanted a multiple of 8$"):
        run(tile=100)
    with pytest.raises(ValueError, match="^overlap 1.0: wanted"):
        run(tile=64, overlap=1.0)
    with pytest.raises(ValueError, match="^overlap -0.1: wanted"):
        run(tile=64, overlap=-0.1)
    with pytest.raises(ValueError, match="^tile 100: wanted a multiple of 8$"):
        bundle.decode(draw((9, 9), 16), tile=100)
