"""Images to latents and back: where the denoiser works, and what people look at."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from sd3_jax.errors import UserError


class Autoencoder(NamedTuple):
    """`encode(batch)` gives scaled latents x0; `decode(x0)` pixels in [-1, 1].

    `factor` pixels lie along a latent's side.
    """

    factor: int
    encode: Callable[[dict], Array]
    decode: Callable[[Array], Array]


def _image(batch):
    return batch["image"].astype(jnp.float32) / 127.5 - 1


def _undecodable(x0):
    raise UserError(
        'config.image.autoencoder = "latents" only reads stored latents: there is no'
        " decoder to make pictures with"
    )


AUTOENCODERS = {
    "pixels": Autoencoder(1, _image, lambda x0: x0),  # the pixels are the latents
    "latents": Autoencoder(8, lambda batch: batch["latents"], _undecodable),
}
