"""U-ViT: time, text and patches are tokens, with long skips between blocks."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from sd3_jax.models import flops
from sd3_jax.models.clip import LayerNorm
from sd3_jax.models.denoiser import TokenDenoiser
from sd3_jax.models.denoiser_blocks import DenoiserBlock
from sd3_jax.models.layers import (
    Dense,
    Embedder,
    Mlp,
    cut,
    timestep_features,
    unpatchify,
    zeros,
)
from sd3_jax.models.vae import Conv


class UViT(TokenDenoiser):
    """U-ViT (Bao et al. 2022, "All are Worth Words"), text-to-image.

    Time, pooled text and text are tokens before the image's. Blocks are pre-norm,
    without adaLN. Outputs of the first half are concatenated to inputs of the second
    half and projected; a 3x3 convolution follows the last block. (The UViT of Hoogeboom
    et al. 2023, a U-Net with a transformer in the middle, is another model.)

    Differences from the paper: sin-cos positions, for any resolution; an MLP for time;
    a token for the pooled text; optional `qk_norm`; a bias in qkv; and a convolution
    that is zero at initialisation.

    `depth` is odd: as many blocks before the middle one as after it.
    """

    def velocity(self, xt: Array, t: Array, context: Array, pooled: Array) -> Array:
        """The velocity. Raises ValueError for an even depth."""
        if self.depth % 2 == 0:
            raise ValueError(f"UViT: depth {self.depth}: expected an odd number")
        embed = lambda x, name: Embedder(self.width, self.dtype, name=name)(x)[:, None]
        image = self.image_tokens(xt)
        tokens = (
            embed(timestep_features(t), "time_embed"),
            embed(pooled, "pooled_embed"),
            self.text_tokens(context),
            image,
        )
        x = cut(jnp.concatenate(tokens, axis=1))  # (b, 2+l+n, d)

        # --- blocks: the first half stacks its outputs, the second pops them
        half = self.depth // 2
        down = lambda block, x: (block(x),) * 2
        up = lambda block, x, skip: (block(x, skip), None)
        if half:  # skips (half, b, 2+l+n, d)
            x, skips = self.scanned(down, half)(self.block(Block, "in_blocks"), x)
        # A scan of one, so that it is rematerialised as the others.
        x, _ = self.scanned(down, 1)(self.block(Block, "mid_blocks"), x)
        if half:
            run = self.scanned(up, half, in_axes=0)
            # Reversed: the first half's last output goes to the first block here.
            x, _ = run(self.block(Block, "out_blocks"), x, skips[::-1])

        # --- image tokens to pixels
        x = LayerNorm(name="final_norm")(x[:, -image.shape[1] :])  # (b, n, d)
        out = self.patch**2 * self.channels
        x = Dense(out, ("embed", None), dtype=self.dtype, name="final")(x)
        picture = unpatchify(x, self.patch, *xt.shape[1:3])
        conv = Conv(self.channels, init=zeros, dtype=self.dtype, name="conv_out")
        return conv(picture)

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        d, n, p = self.width, flops.tokens(self, height, width), self.patch
        length = 2 + text + n  # time and pooled text are tokens
        skips = self.depth // 2 * 2 * 2 * d**2 * length  # from 2d to d
        blocks = self.depth * flops.block(d, length, self.mlp_ratio) + skips
        conv = 2 * 9 * self.channels**2 * n * p**2
        vectors = 2 * d**2 * 2 + 2 * 256 * d
        return float(blocks + conv + vectors + flops.ends(self, n, text, text_dim))


class Block(DenoiserBlock):
    """A pre-norm ViT block, after a projection of [x, skip] where there is a skip."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b n d"]:
        if skip is not None:
            joined = jnp.concatenate([x, skip], axis=-1)  # (b, n, 2d)
            axes = (None, "embed")
            x = cut(Dense(x.shape[-1], axes, dtype=self.dtype, name="skip")(joined))
        x = cut(x + self.self_attention(LayerNorm(name="norm1")(x)))
        mlp = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")
        return cut(x + checkpoint_name(mlp(LayerNorm(name="norm2")(x)), "fed"))
