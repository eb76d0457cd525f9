"""The autoencoder against diffusers', with random weights, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import convert, miniature

from sd3_jax.models import vae
from sd3_jax.weights import vae_keys as table_of_vae

SIZES = dict(channels=(32, 32, 64, 64), layers=1, groups=32, dtype=jnp.float32)


@pytest.fixture(scope="module")
def pair():
    theirs = miniature.vae().eval()
    return theirs, vae.VAE(**SIZES), variables(theirs)


def variables(theirs):
    ours = vae.VAE(**SIZES)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return convert.from_torch(shapes, table_of_vae.table(ours), theirs.state_dict())


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def run(ours, weights, x, method):
    return jax.jit(lambda w, x: ours.apply(w, x, method=method))(weights, x)


@pytest.fixture(scope="module")
def image():
    return jax.random.uniform(jax.random.key(0), (2, 40, 24, 3), minval=-1)


def test_the_moments(pair, image):
    theirs, ours, weights = pair
    wanted = theirs.encode(nchw(image)).latent_dist.parameters
    assert convert.error(run(ours, weights, image, "encode"), nhwc(wanted)) < 2e-5


def test_a_draw_of_the_posterior_and_the_scale(pair, image):
    theirs, ours, weights = pair
    moments = run(ours, weights, image, "encode")
    mean, std = vae.posterior(moments)
    noise = jax.random.normal(jax.random.key(1), mean.shape)
    wanted = theirs.encode(nchw(image)).latent_dist
    z = nhwc(wanted.mean) + nhwc(wanted.std) * np.asarray(noise)
    assert convert.error(vae.sample(jax.random.key(1), moments), z) < 2e-5
    z = jnp.asarray(z)
    x0 = vae.to_latents(z, scaling=1.5305, shift=0.0609)
    np.testing.assert_allclose(x0, (z - 0.0609) * 1.5305, rtol=1e-6)
    back = vae.from_latents(x0, scaling=1.5305, shift=0.0609)
    np.testing.assert_allclose(back, z, rtol=1e-5, atol=1e-6)


def test_the_variance_is_bounded():
    moments = jnp.array([0.0, 0.0, -1e3, 1e3]).reshape(1, 1, 1, 4)
    std = vae.posterior(moments)[1].ravel()
    np.testing.assert_allclose(std, np.exp([-15.0, 10.0]), rtol=1e-6)


def test_the_decoded_image(pair):
    theirs, ours, weights = pair
    z = jax.random.normal(jax.random.key(2), (2, 5, 3, 16))
    wanted = nhwc(theirs.decode(nchw(z)).sample)
    assert convert.error(run(ours, weights, z, "decode"), wanted) < 2e-5
    half = dataclasses.replace(ours, dtype=jnp.bfloat16)
    assert convert.error(run(half, weights, z, "decode"), wanted) < 0.3


def test_epsilon_of_the_group_norms(pair, image):
    """Weights so small that 1e-5 in place of 1e-6 would be plain to see."""
    small = miniature.vae().eval()
    with torch.no_grad():
        small.encoder.conv_in.weight.mul_(3e-3)
        small.encoder.conv_in.bias.mul_(3e-3)
    wanted = nhwc(small.encode(nchw(image)).latent_dist.parameters)
    ours = pair[1]
    assert convert.error(run(ours, variables(small), image, "encode"), wanted) < 2e-5
    for norm in small.modules():
        if isinstance(norm, torch.nn.GroupNorm):
            norm.eps = 1e-5
    other = nhwc(small.encode(nchw(image)).latent_dist.parameters)
    assert convert.error(other, wanted) > 1e-2
