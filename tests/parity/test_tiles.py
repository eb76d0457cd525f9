"""The autoencoder by tiles against diffusers', with random weights, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import convert, miniature
from parity.test_vae import SIZES, nchw, nhwc, variables

from sd3_jax.distributed import sharding
from sd3_jax.models import vae
from sd3_jax.sampling import tiling
from sd3_jax.sampling.bundle import Bundle

# In latents. Tiles are 8 wide, one every 6: of 13 the last is 1 and that before it 7.
SHAPES = {
    "both": (15, 14),
    "both, with slivers": (13, 9),
    "down": (13, 5),
    "across": (7, 9),
    "one tile": (8, 7),
}


@pytest.fixture(scope="module")
def theirs():
    model = miniature.vae().eval().requires_grad_(False)
    model.enable_tiling()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would spin for the cores that JAX's are on
    yield model
    torch.set_num_threads(threads)


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


def around(network, tiled, x, factor, channels):
    """Our tiles about their network, of which the parity is test_vae's to see."""

    def run(x):
        b, h, w, _ = x.shape
        shape = b, int(h * factor), int(w * factor), channels
        out = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.pure_callback(lambda x: nhwc(network(nchw(x))), out, x)

    return jax.jit(lambda x: tiled(run, x, tile=64, factor=8))(x)


def test_the_moments(theirs, shape):
    x = draw(shape, 3, factor=8)
    wanted = nhwc(theirs.encode(nchw(x)).latent_dist.parameters)
    got = around(theirs.encoder, tiling.encode, x, 1 / 8, 32)
    assert convert.error(got, wanted) < 1e-6


def test_the_decoded_image(theirs, shape):
    z = draw(shape, 16)
    wanted = nhwc(theirs.decode(nchw(z)).sample)
    got = around(theirs.decoder, tiling.decode, z, 8, 3)
    assert convert.error(got, wanted) < 1e-6


def test_the_latents_of_a_bundle(theirs, bundle):
    images = (draw((5, 15), 3, factor=8) + 1) / 2
    mean = nhwc(theirs.encode(nchw(2 * images - 1)).latent_dist.mean)
    wanted = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    assert convert.error(bundle.encode_image(images, tile=64), wanted) < 2e-5
    assert convert.error(bundle.encode_image(images), wanted) > 1e-2


def test_the_images_of_a_bundle(theirs, bundle):
    x0 = 5 * draw((5, 15), 16)  # large: their rounding and ours then differ less
    z = x0 / theirs.config.scaling_factor + theirs.config.shift_factor
    wanted = nhwc(theirs.decode(nchw(z)).sample / 2 + 0.5).clip(0, 1)
    assert convert.error(bundle.decode(x0, tile=64), wanted) < 2e-5
    assert convert.error(bundle.decode(x0), wanted) > 1e-2


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.7])
def test_what_is_local_does_not_change(overlap, monkeypatch):
    """By tiles of ten latents, of which none, three or seven overlap."""
    monkeypatch.setattr(tiling, "OVERLAP", overlap)
    x = draw((13, 23), 3)
    run = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)
    tiled = jax.jit(lambda x: tiling.decode(run, x, tile=20, factor=2))
    np.testing.assert_allclose(tiled(x), run(x), atol=1e-6)


@pytest.mark.parametrize("tiled", [tiling.encode, tiling.decode])
def test_tiles_that_cannot_be(tiled):
    run = functools.partial(tiled, lambda x: x, draw((16, 16), 3), factor=8)
    with pytest.raises(ValueError, match="^tile 100: expected a multiple of 8$"):
        run(tile=100)
