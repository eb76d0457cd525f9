"""ControlNets for the MMDiT: of joint blocks as its own, or of a single stream."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models.layers import Dense, patchify, zeros
from sd3_jax.models.mmdit import Block
from sd3_jax.models.position_table import position_table
from sd3_jax.models.token_io import condition, cut


class ControlNet(nn.Module):
    """A noised latent, its condition, time and text to residuals for a denoiser.

    `joint` blocks see the text as the denoiser's do; without, the net reads the image
    alone, and its patch embedding and position table are the denoiser's own
    (`borrowed`). `zero_pooled`: trained with no pooled text, and conditions encoded
    without the autoencoder's shift.
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
        """`scale` times one residual of each of the r = depth blocks."""
        h, w = xt.shape[1] // self.patch, xt.shape[2] // self.patch
        embed = lambda x, init, name: Dense(
            self.width, (None, "embed"), dtype=self.dtype, name=name, **init
        )(patchify(x, self.patch))
        x = embed(xt, {}, "patch_embed") + position_table(self, h, w).astype(self.dtype)
        x = x + embed(hint, {"init": zeros}, "hint_embed")
        x = cut(x)
        c = condition(t, pooled, self.width, self.dtype)
        streams = (x,)
        if self.joint:
            text = Dense(
                self.width, (None, "embed"), dtype=self.dtype, name="context_embed"
            )
            streams = (x, text(context))
        dual, residuals = self.dual_blocks, []
        for name, length in ("dual_blocks", dual), ("blocks", self.depth - dual):
            if length:
                stack = self.stack(length, name, dual=name == "dual_blocks")
                streams, of_stack = stack(streams, c)
                residuals.append(of_stack)
        return jnp.concatenate(residuals) * jnp.asarray(scale, x.dtype)

    def stack(self, length: int, name: str, **kwargs):
        scan = nn.scan(
            lambda block, streams, c: block(streams, c),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        shared = dict(qk_norm=self.qk_norm, dtype=self.dtype)
        block = ControlBlock(self.width, self.num_heads, **shared, **kwargs, name=name)
        return lambda streams, c: scan(block, streams, c)


class ControlBlock(nn.Module):
    """A denoiser's block, and a linear map from its image tokens to a residual."""

    width: int
    num_heads: int
    qk_norm: bool
    dual: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, streams, c: Float[Array, "b d"]):
        block = Block(
            self.width,
            self.num_heads,
            qk_norm=self.qk_norm,
            dual=self.dual,
            weight_sets=len(streams),
            dtype=self.dtype,
            name="block",
        )
        streams = block(streams, block.modulations(c))
        axes = ("embed", None)
        out = Dense(self.width, axes, init=zeros, dtype=self.dtype, name="zero")
        return streams, out(streams[0])
