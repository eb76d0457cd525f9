"""DiT, whose text is tokens among the image's, and CrossDiT, which looks it up."""

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
    """DiT (Peebles & Xie 2023) over image and text tokens in one sequence, the same
    weights for both (SD3 paper, sec. 5.2.3).

    It is the MMDiT with one weight set: adaLN-zero by time and pooled text, sin-cos
    positions for the image and none for text.
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
        x = cut(jnp.concatenate([x, text], axis=1))  # (b, n+l, d)
        x, _ = run(block_of(self, DiTBlock), x, c)
        return velocity(self, x[:, :n], c, *xt.shape[1:3])


class CrossDiT(nn.Module):
    """DiT over image tokens alone, with a cross-attention to the text in each block,
    after the self-attention, as in PixArt-alpha (Chen et al. 2023).

    adaLN has weights of its own in each block, as DiT's, so that the way of the text is
    all that differs from it; PixArt shares them between blocks.
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
    """Self-attention and MLP, each modulated and gated; the identity at birth."""

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
        modulation = jnp.unstack(modulation, axis=1)
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
        modulation = jnp.unstack(modulation, axis=1)
        shift, scale, gate = modulation[:3]
        attend = self_attention(self)
        x = cut(x + gate[:, None] * attend(modulate(layer_norm(x), shift, scale)))
        look = CrossAttention(
            self.num_heads, self.qk_norm, self.dtype, self.attention, name="cross"
        )
        x = cut(x + look(x, text))  # neither norm nor gate, as in PixArt
        return fed(self, x, modulation[3:])


def self_attention(block: nn.Module):
    """Of the block that calls; its weights are the submodule "attn"."""

    def attend(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width, options = x.shape[-1], dict(qk_norm=block.qk_norm, dtype=block.dtype)
        attn = Projections(width, block.num_heads, **options, name="attn")
        q, k, v = attn.qkv(x)
        h = attention(q, whole(k), whole(v), kernel=block.attention)
        return attn.project(h)

    return attend


def fed(block: nn.Module, x: Float[Array, "b n d"], modulation) -> Array:
    shift, scale, gate = modulation
    mlp = Mlp(block.mlp_ratio, dtype=block.dtype, name="mlp")
    h = mlp(modulate(layer_norm(x), shift, scale))
    return cut(x + gate[:, None] * checkpoint_name(h, "fed"))


class CrossAttention(nn.Module):
    """From tokens to a text of any width; adds nothing at birth."""

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
        k, v = jnp.unstack(checkpoint_name(kv, "qkv"), axis=-3)  # (b, l, a, k)
        if self.qk_norm:
            q, k = RmsNorm(name="norm_q")(q), RmsNorm(name="norm_k")(k)
        q = nn.with_logical_constraint(q, ("batch", "tokens", "heads", None))
        h = attention(q, whole(k), whole(v), kernel=self.attention)
        out = dense(d, ("heads", None, "embed"), "to_out", init=zeros)
        return checkpoint_name(out(h), "projected")
