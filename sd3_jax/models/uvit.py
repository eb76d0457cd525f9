"""U-ViT: time, text and patches are tokens, with long skips between blocks."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.clip import LayerNorm
from sd3_jax.models.dit import block_of, self_attention
from sd3_jax.models.layers import (
    Dense,
    Embedder,
    Mlp,
    timestep_features,
    unpatchify,
    zeros,
)
from sd3_jax.models.scan import scanned
from sd3_jax.models.token_io import cut, image_tokens, text_tokens
from sd3_jax.models.vae import Conv


class UViT(nn.Module):
    """U-ViT (Bao et al. 2022, "All are Worth Words"), text-to-image.

    Time, pooled text and text are tokens before the image's. Blocks are pre-norm,
    without adaLN. Outputs of the first half are concatenated to inputs of the second
    half and projected; a 3x3 convolution follows the last block. (The UViT of Hoogeboom
    et al. 2023, a U-Net with a transformer in the middle, is another model.)

    Differences from the paper: sin-cos positions, for any resolution; an MLP for time;
    a token for the pooled text; optional `qk_norm`; a bias in qkv; and a convolution
    that is zero at initialisation.
    """

    depth: int  # odd: as many blocks before the middle one as after it
    width: int
    num_heads: int
    patch: int = 2
    channels: int = 16
    mlp_ratio: int = 4
    qk_norm: bool = True
    pos_size: int = 192
    pos_base: int = 64
    dtype: DTypeLike = jnp.bfloat16
    remat: str = "full"
    unroll: int = 1
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l k"],
        pooled: Float[Array, "b e"],
    ) -> Float[Array, "b h w c"]:
        """The velocity (b, h, w, c) at (xt, t), float32. ValueError for even depth."""
        if self.depth % 2 == 0:
            raise ValueError(f"UViT: depth {self.depth}: wanted an odd number")
        embed = lambda x, name: Embedder(self.width, self.dtype, name=name)(x)[:, None]
        image = image_tokens(self, xt)
        tokens = (
            embed(timestep_features(t), "time_embed"),
            embed(pooled, "pooled_embed"),
            text_tokens(self, context),
            image,
        )
        x = cut(jnp.concatenate(tokens, axis=1))  # (b, 2+l+n, d)

        # --- blocks: the first half stacks its outputs, the second pops them
        half, shared = self.depth // 2, dict(remat=self.remat, unroll=self.unroll)
        down = lambda block, x: (block(x),) * 2
        up = lambda block, x, skip: (block(x, skip), None)
        if half:  # skips (half, b, 2+l+n, d)
            x, skips = scanned(down, half, **shared)(
                block_of(self, Block, "in_blocks"), x
            )
        # A scan of one, so that it is rematerialised as the others.
        x, _ = scanned(down, 1, **shared)(block_of(self, Block, "mid_blocks"), x)
        if half:
            run = scanned(up, half, **shared, in_axes=0)
            # Reversed: the first half's last output goes to the first block here.
            x, _ = run(block_of(self, Block, "out_blocks"), x, skips[::-1])

        # --- image tokens to pixels
        x = LayerNorm(name="final_norm")(x[:, -image.shape[1] :])  # (b, n, d)
        out = self.patch**2 * self.channels
        x = Dense(out, ("embed", None), dtype=self.dtype, name="final")(x)
        picture = unpatchify(x, self.patch, *xt.shape[1:3])
        conv = Conv(self.channels, init=zeros, dtype=self.dtype, name="conv_out")
        return conv(picture).astype(jnp.float32)


class Block(nn.Module):
    """A pre-norm ViT block, after a projection of [x, skip] where there is a skip."""

    num_heads: int
    mlp_ratio: int
    qk_norm: bool
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], skip: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b n d"]:
        if skip is not None:
            joined = jnp.concatenate([x, skip], axis=-1)  # (b, n, 2d)
            axes = (None, "embed")
            x = cut(Dense(x.shape[-1], axes, dtype=self.dtype, name="skip")(joined))
        x = cut(x + self_attention(self)(LayerNorm(name="norm1")(x)))
        mlp = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")
        return cut(x + checkpoint_name(mlp(LayerNorm(name="norm2")(x)), "fed"))
