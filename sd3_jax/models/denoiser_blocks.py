"""Parts of the denoisers' blocks: attention of image tokens, and its projections."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.attention.attention import attention
from sd3_jax.models.attention.context import context_attention
from sd3_jax.models.layers import Dense, RmsNorm, whole, zeros

# What a denoiser hands to its blocks, and they to the modules in them.
OPTIONS = ("num_heads", "mlp_ratio", "qk_norm", "dtype", "attention")
OPTIONS += ("context_attention",)


def block_options(module: nn.Module) -> dict[str, Any]:
    """The OPTIONS of a denoiser or block, as arguments of a module in it."""
    return {name: getattr(module, name) for name in OPTIONS}


class DenoiserBlock(nn.Module):
    """Options of a block, and the attentions that it may have.

    Call the methods from the block's compact method: the weights are then the block's
    submodules "attn" and "cross".
    """

    num_heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: DTypeLike = jnp.bfloat16
    attention: str = "auto"
    context_attention: str = "gather"

    def self_attention(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        width, options = x.shape[-1], dict(qk_norm=self.qk_norm, dtype=self.dtype)
        attn = Projections(width, self.num_heads, **options, name="attn")
        q, k, v = attn.qkv(x)  # (b, n, a, k) each
        return attn.project(self.attend([q], [k], [v])[0])

    def attend(
        self, qs: Sequence[Array], ks: Sequence[Array], vs: Sequence[Array]
    ) -> Sequence[Array]:
        """The joint attention (b, _, a, k) of streams, over the mesh's context axis."""
        options = dict(method=self.context_attention, kernel=self.attention)
        return context_attention(qs, ks, vs, **options)

    def cross_attention(
        self, x: Float[Array, "b n d"], text: Float[Array, "b l k"]
    ) -> Float[Array, "b n d"]:
        look = CrossAttention(
            self.num_heads, self.qk_norm, self.dtype, self.attention, name="cross"
        )
        return look(x, text)


class Projections(nn.Module):
    """Linear maps to q, k and v and out of attention; qk-norm keeps logits bounded.

    q and k are RMS-normed by head where `qk_norm` (paper, sec. 5.3.2).
    """

    width: int
    num_heads: int
    qk_norm: bool
    out: bool = True
    dtype: DTypeLike = jnp.bfloat16

    def setup(self):
        size = self.width // self.num_heads
        heads = (3, self.num_heads, size)
        axes = ("embed", None, "heads", None)
        self.to_qkv = Dense(heads, axes, dtype=self.dtype)
        if self.qk_norm:
            self.norm_q = RmsNorm()
            self.norm_k = RmsNorm()
        if self.out:
            axes = ("heads", None, "embed")
            self.to_out = Dense(self.width, axes, dtype=self.dtype)

    def qkv(self, x: Float[Array, "b n d"]) -> Sequence[Float[Array, "b n a k"]]:
        qkv = self.to_qkv(x)  # (b, n, 3, a, k)
        axes = ("batch", "tokens", None, "heads", None)
        qkv = nn.with_logical_constraint(qkv, axes)
        # Saved before the norms: the backward pass then redoes cheap norms only.
        q, k, v = (saved(x) for x in jnp.unstack(qkv, axis=-3))
        return (self.norm_q(q), self.norm_k(k), v) if self.qk_norm else (q, k, v)

    def project(self, x: Float[Array, "b n a k"]) -> Float[Array, "b n d"]:
        return checkpoint_name(self.to_out(x), "projected")


class CrossAttention(nn.Module):
    """Attention from tokens (b, n, d) to text (b, l, k); zero at initialisation."""

    num_heads: int
    qk_norm: bool
    dtype: DTypeLike
    attention: str

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


def saved(x: Float[Array, "b n a k"]) -> Float[Array, "b n a k"]:
    """q, k or v (b, n, a, k) under the name by which remat keeps it."""
    # Flat: a TPU pads heads of 64 to 128 lanes, twice the memory. Not all three in one
    # array: XLA would copy it to take them apart.
    return checkpoint_name(x.reshape(*x.shape[:2], -1), "qkv").reshape(x.shape)
