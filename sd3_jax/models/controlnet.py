"""ControlNets for the MMDiT, of joint blocks or of image tokens alone."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.layers import Dense, condition, cut, patchify, zeros
from sd3_jax.models.mmdit import Block
from sd3_jax.models.position_table import position_table
from sd3_jax.models.scan import scanned


class ControlNet(nn.Module):
    """ControlNet (Zhang et al. 2023): residuals for the blocks of an MMDiT.

    With `joint`, the blocks attend over image and text as the denoiser's do. Without,
    the net sees image tokens only, and takes its patch embedding and position table
    from the denoiser (`borrowed`). `zero_pooled`: the net was trained with a pooled
    text of zeros, and with hints encoded without the autoencoder's shift.
    """

    depth: int
    width: int
    num_heads: int
    patch: int = 2
    hint_channels: int = 16
    qk_norm: bool = False
    dual_blocks: int = 0
    joint: bool = True
    zero_pooled: bool = True
    pos_size: int = 192
    pos_base: int = 64
    dtype: DTypeLike = jnp.bfloat16
    context_attention: str = "gather"

    @property
    def borrowed(self) -> bool:
        return not self.joint

    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l k"],
        pooled: Float[Array, "b e"],
        hint: Float[Array, "b h w k2"],
        *,
        scale: Any = 1.0,
    ) -> Float[Array, "r b n d"]:
        """`scale` times the residuals (r, b, n, d), one from each of r blocks."""
        # --- tokens: the latent's with positions, plus the hint's
        h, w = xt.shape[1] // self.patch, xt.shape[2] // self.patch  # in tokens
        embed = lambda x, init, name: Dense(
            self.width, (None, "embed"), dtype=self.dtype, name=name, **init
        )(patchify(x, self.patch))
        x = embed(xt, {}, "patch_embed") + position_table(self, h, w).astype(self.dtype)
        # Zero, as the map out of each block: a new net leaves its denoiser unchanged.
        x = x + embed(hint, {"init": zeros}, "hint_embed")  # (b, n, d)
        x = cut(x)
        c = condition(t, pooled, self.width, self.dtype)
        # --- blocks: with text a pair of streams, without it the image's alone
        streams = (x,)
        if self.joint:
            text = Dense(
                self.width, (None, "embed"), dtype=self.dtype, name="context_embed"
            )
            streams = (x, text(context))
        # The dual blocks are another scan, since they have more weights.
        dual, residuals = self.dual_blocks, []
        for name, length in ("dual_blocks", dual), ("blocks", self.depth - dual):
            if length:
                stack = self.stack(length, name, dual=name == "dual_blocks")
                streams, of_stack = stack(streams, c)
                residuals.append(of_stack)  # (length, b, n, d)
        # Cast: a traced float32 scale would make bfloat16 residuals float32.
        return jnp.concatenate(residuals) * jnp.asarray(scale, x.dtype)

    def stack(self, length: int, name: str, **kwargs):
        """Blocks in one scan, whose stacked outputs are the residuals."""
        scan = scanned(lambda block, streams, c: block(streams, c), length)
        shared = dict(qk_norm=self.qk_norm, dtype=self.dtype)
        shared |= dict(context_attention=self.context_attention)
        block = ControlBlock(self.width, self.num_heads, **shared, **kwargs, name=name)
        return lambda streams, c: scan(block, streams, c)


class ControlBlock(nn.Module):
    """A block of the MMDiT, and a linear map from its image tokens to a residual."""

    width: int
    num_heads: int
    qk_norm: bool
    dual: bool
    dtype: DTypeLike
    context_attention: str

    @nn.compact
    def __call__(self, streams, c: Float[Array, "b d"]):
        block = Block(
            self.num_heads,
            width=self.width,
            qk_norm=self.qk_norm,
            dual=self.dual,
            weight_sets=len(streams),
            dtype=self.dtype,
            context_attention=self.context_attention,
            name="block",
        )
        streams = block(streams, block.modulations(c))
        axes = ("embed", None)
        out = Dense(self.width, axes, init=zeros, dtype=self.dtype, name="zero")
        return streams, out(streams[0])  # the image stream is first
