"""The compiled programs of the autoencoder: pure functions, the module static."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from sd3_jax.models import vae
from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.sampling import compiled, tiling


@functools.partial(jax.jit, static_argnames=("module", "tile"))
def encode_image(
    module,
    variables,
    images,
    key,
    *,
    scaling,
    shift,
    noise=None,
    tile: int | None = None,
) -> Array:
    """Images in [0, 1] to latents: a draw with `key` or `noise`, else the mean.

    A TAESD has no variance: there is nothing to draw.
    """
    if isinstance(module, TinyAutoencoder):
        z = _moments(module, variables, images, tile)
        return vae.to_latents(z, scaling=scaling, shift=shift)
    moments = _moments(module, variables, images, tile)
    if noise is not None:
        mean, std = vae.posterior(moments)
        z = mean + std * noise
    elif key is None:
        z = vae.posterior(moments)[0]
    else:
        # A key for each row makes a row's draw independent of the batch that it is in.
        z = (jax.vmap(vae.sample) if key.ndim else vae.sample)(key, moments)
    return vae.to_latents(z, scaling=scaling, shift=shift)


@functools.partial(jax.jit, static_argnames=("module", "tile"))
def posterior(module, variables, images, *, tile: int | None = None):
    """Mean and clipped log-variance of the autoencoder's latents, not scaled."""
    mean, logvar = jnp.split(_moments(module, variables, images, tile), 2, axis=-1)
    return mean, jnp.clip(logvar, *vae.LOGVAR)


def _moments(module, variables, images, tile):
    # `tile` is static, because it decides the shapes of all slices.
    run = _by_tiles(module, variables, "encode", tile)
    # (b, H, W, 3) → (b, H/8, W/8, 2c): mean and log-variance
    return run(2 * images - 1)


@functools.partial(jax.jit, static_argnames=("module", "tile"))
def decode(
    module, variables, latents, *, scaling, shift, tile: int | None = None
) -> Array:
    """Latents to images in [0, 1]."""
    sides = (side * _factor(module) for side in latents.shape[1:3])
    compiled.say_compiling("the decoder", len(latents), *sides)
    # `scaling` and `shift` are traced numbers, so models that differ in them share a
    # program.
    z = vae.from_latents(latents, scaling=scaling, shift=shift)
    # (b, h, w, c) → (b, 8h, 8w, 3)
    images = _by_tiles(module, variables, "decode", tile)(z)
    return jnp.clip(images / 2 + 0.5, 0, 1)


def _by_tiles(module, variables, method, tile):
    """The autoencoder's method, whole where tile is None."""
    run = functools.partial(module.apply, variables, method=method)
    if tile is None:
        return run
    by_tiles = getattr(tiling, method)
    return functools.partial(by_tiles, run, tile=tile, factor=_factor(module))


def _factor(module) -> int:
    """Pixels a latent: every level but the first halves the sides."""
    return 2 ** (len(module.channels) - 1)
