"""TAESD (Ollin Boer Bohan, github.com/madebyollin/taesd), a small autoencoder.

diffusers' AutoencoderTiny: 2.5 M parameters, convolutions and ReLU alone. Its latents
are those of the denoiser: neither shifted nor scaled, and without a variance.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sd3_jax.models.vae import Conv, spread

# madebyollin's Clamp: tanh(x / 3) * 3.
SATURATION = 3.0  # the decoder's inputs are bounded, smoothly, by this size


class TinyAutoencoder(nn.Module):
    """Images in [-1, 1] to latents 2^(levels - 1) times smaller, and back.

    Apply it with `method="encode"` or `"decode"`. `channels` and `decoder_blocks` go
    from the latents to the pixels, `encoder_channels` and `encoder_blocks` the other
    way.
    """

    channels: Sequence[int] = (64, 64, 64, 64)
    encoder_channels: Sequence[int] = (64, 64, 64, 64)
    latent_channels: int = 16
    encoder_blocks: Sequence[int] = (1, 3, 3, 3)
    decoder_blocks: Sequence[int] = (3, 3, 3, 1)
    dtype: DTypeLike = jnp.float32

    def setup(self):
        self.encoder = TinyEncoder(
            tuple(self.encoder_channels),
            tuple(self.encoder_blocks),
            self.latent_channels,
            self.dtype,
        )
        self.decoder = TinyDecoder(
            tuple(self.channels), tuple(self.decoder_blocks), self.dtype
        )

    def encode(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Latents, float32; there is nothing to draw."""
        # TAESD works on images in [0, 1], ours are in [-1, 1].
        return self.encoder((image + 1) / 2).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images (b, H, W, 3) of about [-1, 1], not clipped, in float32."""
        return 2 * self.decoder(z).astype(jnp.float32) - 1

    def __call__(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return self.decode(self.encode(image))


class TinyEncoder(nn.Module):
    """Images in [0, 1] to latents: blocks, and convolutions of stride 2 between."""

    channels: Sequence[int]
    blocks: Sequence[int]
    out: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        conv = lambda out, name, **kw: Conv(out, dtype=self.dtype, name=name, **kw)
        h = conv(self.channels[0], "conv_in")(spread(x))
        for i, out in enumerate(self.channels):
            if i > 0:
                # On all sides, unlike the large autoencoder's right and bottom.
                h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
                h = conv(out, f"down_{i}", stride=2, bias=False)(h)  # (b, h/2, w/2, c)
            for j in range(self.blocks[i]):
                h = Block(out, self.dtype, name=f"level_{i}_block_{j}")(h)
        return conv(self.out, "conv_out")(h)


class TinyDecoder(nn.Module):
    """Latents to images in [0, 1]: blocks, nearest-neighbour upsampling between."""

    channels: Sequence[int]
    blocks: Sequence[int]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        conv = lambda out, name, **kw: Conv(out, dtype=self.dtype, name=name, **kw)
        h = SATURATION * jnp.tanh(spread(z) / SATURATION)
        h = nn.relu(conv(self.channels[0], "conv_in")(h))
        last = len(self.channels) - 1
        for i, out in enumerate(self.channels):
            for j in range(self.blocks[i]):
                h = Block(out, self.dtype, name=f"level_{i}_block_{j}")(h)
            if i < last:
                # torch's nn.Upsample(scale_factor=2), whose default is nearest.
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)  # (b, 2h, 2w, c)
                h = conv(out, f"up_{i}", bias=False)(h)
        return conv(3, "conv_out")(h)


class Block(nn.Module):
    """Three convolutions with ReLU between, plus the input, and ReLU."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        conv = lambda name: Conv(self.features, dtype=self.dtype, name=name)
        h = nn.relu(conv("conv1")(x))
        h = nn.relu(conv("conv2")(h))
        # No projection on the skip path, since all blocks here keep their width.
        return nn.relu(x.astype(self.dtype) + conv("conv3")(h))
