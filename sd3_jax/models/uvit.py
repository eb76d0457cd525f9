"""U-ViT: everything is a token, and shallow blocks reach deep ones by long skips."""

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
    """U-ViT (Bao et al. 2022, "All are Worth Words"), its text-to-image form.

    Time, pooled text and text are tokens before the image's; plain pre-norm blocks,
    no adaLN; the first half's outputs join the second half's inputs, side by side and
    through a linear map; a 3x3 convolution ends it. (Hoogeboom et al. 2023 call UViT
    what is a U-Net with a transformer in its middle; that is not this.) Ours differs in
    that positions are the sin-cos table's, for any resolution, time has an MLP, the
    pooled text a token, q and k are normed where `qk_norm`, qkv has a bias, and the
    convolution is zero at birth.
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
        """The velocity at (xt, t)."""
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
            x, _ = run(block_of(self, Block, "out_blocks"), x, skips[::-1])

        x = LayerNorm(name="final_norm")(x[:, -image.shape[1] :])
        out = self.patch**2 * self.channels
        x = Dense(out, ("embed", None), dtype=self.dtype, name="final")(x)
        picture = unpatchify(x, self.patch, *xt.shape[1:3])
        conv = Conv(self.channels, init=zeros, dtype=self.dtype, name="conv_out")
        return conv(picture).astype(jnp.float32)


class Block(nn.Module):
    """A vision transformer's, before it the long skip where there is one."""

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
            joined = jnp.concatenate([x, skip], axis=-1)
            axes = (None, "embed")
            x = cut(Dense(x.shape[-1], axes, dtype=self.dtype, name="skip")(joined))
        x = cut(x + self_attention(self)(LayerNorm(name="norm1")(x)))
        mlp = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")
        return cut(x + checkpoint_name(mlp(LayerNorm(name="norm2")(x)), "fed"))
