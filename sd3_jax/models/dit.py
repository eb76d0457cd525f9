"""DiT over image and text tokens, and CrossDiT with cross-attention to the text."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.attention.attention import attention
from sd3_jax.models.layers import Dense, Mlp, RmsNorm, layer_norm, modulate, zeros
from sd3_jax.models.mmdit import Projections
from sd3_jax.models.scan import scanned
from sd3_jax.models.token_io import (
    Modulation,
    condition,
    cut,
    image_tokens,
    text_tokens,
    velocity,
    whole,
)


class DiT(nn.Module):
    """DiT (Peebles & Xie 2023) on one sequence of image and text tokens.

    The baseline of the SD3 paper (sec. 5.2.3): an MMDiT with one set of weights for
    both modalities. adaLN-zero reads time and pooled text. Image tokens have sin-cos
    positions, text tokens none.
    """

    depth: int
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
        x, text = image_tokens(self, xt), text_tokens(self, context)
        c = condition(t, pooled, self.width, self.dtype)
        run = scanned(
            lambda block, x, c: (block(x, c), None),
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
        )
        n = x.shape[1]
        # Image first: its tokens are then x[:, :n], whatever the text's length.
        x = cut(jnp.concatenate([x, text], axis=1))  # (b, n+l, d)
        x, _ = run(block_of(self, DiTBlock), x, c)
        # The text's last states are not used.
        return velocity(self, x[:, :n], c, *xt.shape[1:3])


class CrossDiT(nn.Module):
    """DiT on image tokens, with cross-attention to the text after each self-attention.

    After PixArt-alpha (Chen et al. 2023), except that each block has its own adaLN
    weights, as in DiT: the two models then differ only in how they read the text.
    PixArt shares one adaLN between all blocks.
    """

    depth: int
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
        x, text = image_tokens(self, xt), text_tokens(self, context)
        c = condition(t, pooled, self.width, self.dtype)
        run = scanned(
            lambda block, x, c, text: (block(x, c, text), None),
            self.depth,
            remat=self.remat,
            unroll=self.unroll,
        )
        x, _ = run(block_of(self, CrossBlock), x, c, text)
        return velocity(self, x, c, *xt.shape[1:3])


def block_of(
    model: nn.Module, kind: type[nn.Module], name: str = "blocks"
) -> nn.Module:
    return kind(
        model.num_heads,
        mlp_ratio=model.mlp_ratio,
        qk_norm=model.qk_norm,
        dtype=model.dtype,
        attention=model.attention,
        name=name,
    )


class DiTBlock(nn.Module):
    """Self-attention and MLP with adaLN-zero; the identity at initialisation."""

    num_heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: DTypeLike = jnp.bfloat16
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        modulation = Modulation(6, x.shape[-1], self.dtype, name="adaln")(c)
        modulation = jnp.unstack(modulation, axis=1)  # 6 of (b, d)
        shift, scale, gate = modulation[:3]
        attend = self_attention(self)
        x = cut(x + gate[:, None] * attend(modulate(layer_norm(x), shift, scale)))
        return fed(self, x, modulation[3:])


class CrossBlock(nn.Module):
    """DiT's block with a cross-attention between its two halves."""

    num_heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: DTypeLike = jnp.bfloat16
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        c: Float[Array, "b d"],
        text: Float[Array, "b l d"],
    ) -> Float[Array, "b n d"]:
        modulation = Modulation(6, x.shape[-1], self.dtype, name="adaln")(c)
        modulation = jnp.unstack(modulation, axis=1)  # 6 of (b, d)
        shift, scale, gate = modulation[:3]
        attend = self_attention(self)
        x = cut(x + gate[:, None] * attend(modulate(layer_norm(x), shift, scale)))
        look = CrossAttention(
            self.num_heads, self.qk_norm, self.dtype, self.attention, name="cross"
        )
        x = cut(x + look(x, text))  # neither norm nor gate, as in PixArt
        return fed(self, x, modulation[3:])


def self_attention(block: nn.Module):
    """Self-attention with the options of `block`, whose submodule "attn" it makes.

    Called inside the block's compact method, so that flax files the weights there.
    """

    def attend(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width, options = x.shape[-1], dict(qk_norm=block.qk_norm, dtype=block.dtype)
        attn = Projections(width, block.num_heads, **options, name="attn")
        q, k, v = attn.qkv(x)  # (b, n, a, k) each
        # Under context parallelism queries stay sharded; keys and values do not.
        h = attention(q, whole(k), whole(v), kernel=block.attention)
        return attn.project(h)

    return attend


def fed(block: nn.Module, x: Float[Array, "b n d"], modulation) -> Array:
    """x plus the gated MLP of the modulated x; `modulation` is shift, scale, gate."""
    shift, scale, gate = modulation
    mlp = Mlp(block.mlp_ratio, dtype=block.dtype, name="mlp")
    h = mlp(modulate(layer_norm(x), shift, scale))
    # Saved by remat: the gate's gradient needs it, and fc2 would run again for it.
    return cut(x + gate[:, None] * checkpoint_name(h, "fed"))


class CrossAttention(nn.Module):
    """Attention from tokens (b, n, d) to text (b, l, k); zero at initialisation."""

    num_heads: int
    qk_norm: bool = True
    dtype: DTypeLike = jnp.bfloat16
    attention: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], text: Float[Array, "b l k"]
    ) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        heads = (self.num_heads, d // self.num_heads)
        dense = lambda features, axes, name, **init: Dense(
            features, axes, dtype=self.dtype, name=name, **init
        )
        q = checkpoint_name(dense(heads, ("embed", "heads", None), "to_q")(x), "qkv")
        kv = dense((2, *heads), ("embed", None, "heads", None), "to_kv")(text)
        # (b, l, 2, a, k)
        k, v = jnp.unstack(checkpoint_name(kv, "qkv"), axis=-3)  # (b, l, a, k)
        if self.qk_norm:
            q, k = RmsNorm(name="norm_q")(q), RmsNorm(name="norm_k")(k)
        q = nn.with_logical_constraint(q, ("batch", "tokens", "heads", None))
        h = attention(q, whole(k), whole(v), kernel=self.attention)
        # Zero, since nothing gates it: a new block starts as DiT's.
        out = dense(d, ("heads", None, "embed"), "to_out", init=zeros)
        return checkpoint_name(out(h), "projected")
