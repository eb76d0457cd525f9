"""Autoencoders between images and the denoiser's latents, and cheap previews."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, UInt8

from sd3_jax.errors import UserError
from sd3_jax.models import vae


class Autoencoder(NamedTuple):
    """`encode(batch, key)` gives scaled latents x0; `decode(x0)` pixels in [-1, 1].

    `factor` pixels lie along a latent's side. From stored moments, x0 is drawn again at
    each step with the key; stored latents are x0 itself.
    """

    factor: int
    encode: Callable[[dict, Array], Array]
    decode: Callable[[Array], Array]


# The released code's, for previews: sixteen channels of latents to red, green and blue.
TO_RGB = (
    (-0.0645, 0.0177, 0.1052),
    (0.0028, 0.0312, 0.0650),
    (0.1848, 0.0762, 0.0360),
    (0.0944, 0.0360, 0.0889),
    (0.0897, 0.0506, -0.0364),
    (-0.0020, 0.1203, 0.0284),
    (0.0855, 0.0118, 0.0283),
    (-0.0539, 0.0658, 0.1047),
    (-0.0057, 0.0116, 0.0700),
    (-0.0412, 0.0281, -0.0039),
    (0.1106, 0.1171, 0.1220),
    (-0.0248, 0.0682, -0.0481),
    (0.0815, 0.0846, 0.1207),
    (-0.0120, -0.0055, -0.0867),
    (-0.0749, -0.0634, -0.0456),
    (-0.1418, -0.1457, -0.1259),
)


def to_rgb(latents: Float[Array, "b h w 16"]) -> Float[Array, "b h w 3"]:
    """A rough picture in [0, 1] of scaled latents, without the autoencoder."""
    return jnp.clip((latents @ jnp.array(TO_RGB) + 1) / 2, 0, 1)


def previews(
    module: nn.Module | None, weights: tuple[dict, dict] | None
) -> Callable[[Array], Array]:
    """Latents to pictures in [0, 1]: to_rgb, or an autoencoder's (b, 8h, 8w, 3).

    `weights` are its variables, and the scaling and shift of its latents.
    """
    if module is None or weights is None:
        return to_rgb
    variables, scale = weights

    def decoded(x0: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        z = vae.from_latents(x0, **scale)
        images = module.apply(variables, z, method="decode")
        return jnp.clip(images / 2 + 0.5, 0, 1)

    return decoded


def pixels(image: UInt8[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """Bytes to [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1


def scaled(
    moments: Float[Array, "b h w k"], *, scaling: float | Array, shift: float | Array
) -> Float[Array, "b h w k"]:
    """Moments of the autoencoder's latents to moments of the denoiser's latents."""
    mean, std = vae.posterior(moments)
    # The shift moves the mean alone; the scaling also scales the std: 2 log(std
    # scaling) is the new log-variance.
    mean = vae.to_latents(mean, scaling=scaling, shift=shift)
    return jnp.concatenate([mean, 2 * jnp.log(std * scaling)], axis=-1)


def _stored(batch, key):
    # Stored in config.encode.latents_dtype, float16 by default; drawn in float32.
    if "moments" in batch:
        return vae.sample(key, batch["moments"].astype(jnp.float32))
    return batch["latents"].astype(jnp.float32)


def _undecodable(x0):
    raise UserError(
        'config.image.autoencoder = "latents" only reads stored latents: it has no'
        " decoder to make pictures"
    )


AUTOENCODERS = {
    # The pixels are the latents.
    "pixels": Autoencoder(1, lambda batch, key: pixels(batch["image"]), lambda x0: x0),
    "latents": Autoencoder(8, _stored, _undecodable),
}
