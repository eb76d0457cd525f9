"""The two kinds of autoencoders: modules of AutoencoderKL and AutoencoderTiny."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.models.vae import VAE
from sd3_jax.weights import (
    inferred_sizes,
    published_configs,
    tiny_autoencoder_keys,
    vae_keys,
)
from sd3_jax.weights.inferred_sizes import Shapes
from sd3_jax.weights.key_mapping import Group


def is_tiny(config: Any, tensors: Shapes | None) -> bool:
    """Whether an autoencoder is a TAESD, by its class or else by its tensors."""
    if isinstance(config, Mapping) and "_class_name" in config:
        return config["_class_name"] == "AutoencoderTiny"
    # A single file has no configuration.
    return tensors is not None and inferred_sizes.is_tiny(tensors)


def build(config: dict, dtype: Any) -> VAE | TinyAutoencoder:
    """The module of diffusers' AutoencoderKL or AutoencoderTiny configuration."""
    if is_tiny(config, None):
        return _build_tiny(config, dtype)
    c = published_configs.read("vae", config)
    return VAE(
        channels=tuple(c["block_out_channels"]),
        latent_channels=c["latent_channels"],
        layers=c["layers_per_block"],
        groups=c["norm_num_groups"],
        mid_attention=c["mid_block_add_attention"],
        dtype=dtype,
    )


def _build_tiny(config: dict, dtype: Any) -> TinyAutoencoder:
    c = published_configs.read("taesd", config)
    return TinyAutoencoder(
        channels=tuple(c["decoder_block_out_channels"]),
        encoder_channels=tuple(c["encoder_block_out_channels"]),
        latent_channels=c["latent_channels"],
        encoder_blocks=tuple(c["num_encoder_blocks"]),
        decoder_blocks=tuple(c["num_decoder_blocks"]),
        dtype=dtype,
    )


def table(module: VAE | TinyAutoencoder) -> list[Group]:
    """The key table of either."""
    if isinstance(module, TinyAutoencoder):
        return tiny_autoencoder_keys.table(module)
    return vae_keys.table(module)


def example(module: VAE | TinyAutoencoder, config: dict) -> tuple:
    """Arguments for its init."""
    # The smallest image: parameters' shapes do not depend on its size.
    side = 2 ** (len(module.channels) - 1)  # one latent
    return (jnp.zeros((1, side, side, 3)),)
