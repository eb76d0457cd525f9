"""DiT over image and text tokens, and CrossDiT with cross-attention to the text."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from sd3_jax.models import flops
from sd3_jax.models.denoiser import TokenDenoiser
from sd3_jax.models.denoiser_blocks import DenoiserBlock
from sd3_jax.models.layers import Mlp, Modulation, cut, layer_norm, modulate


class DiT(TokenDenoiser):
    """DiT (Peebles & Xie 2023) on one sequence of image and text tokens.

    The baseline of the SD3 paper (sec. 5.2.3): an MMDiT with one set of weights for
    both modalities. adaLN-zero reads time and pooled text. Image tokens have sin-cos
    positions, text tokens none.
    """

    def velocity(self, xt: Array, t: Array, context: Array, pooled: Array) -> Array:
        x, text = self.image_tokens(xt), self.text_tokens(context)
        c = self.condition(t, pooled)
        n = x.shape[1]
        # Image first: its tokens are then x[:, :n], whatever the text's length.
        x = cut(jnp.concatenate([x, text], axis=1))  # (b, n+l, d)
        run = self.scanned(lambda block, x, c: (block(x, c), None), self.depth)
        x, _ = run(self.block(DiTBlock, "blocks"), x, c)
        # The text's last states are not used.
        return self.final_layer(x[:, :n], c, *xt.shape[1:3])

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        d, n = self.width, flops.tokens(self, height, width)
        blocks = self.depth * flops.block(d, n + text, self.mlp_ratio)
        return float(
            blocks + flops.modulated(self) + flops.ends(self, n, text, text_dim)
        )


class CrossDiT(TokenDenoiser):
    """DiT on image tokens, with cross-attention to the text after each self-attention.

    After PixArt-alpha (Chen et al. 2023), except that each block has its own adaLN
    weights, as in DiT: the two models then differ only in how they read the text.
    PixArt shares one adaLN between all blocks.
    """

    def velocity(self, xt: Array, t: Array, context: Array, pooled: Array) -> Array:
        x, text = self.image_tokens(xt), self.text_tokens(context)
        c = self.condition(t, pooled)
        body = lambda block, x, c, text: (block(x, c, text), None)
        run = self.scanned(body, self.depth)
        x, _ = run(self.block(DiTBlock, "blocks"), x, c, text)
        return self.final_layer(x, c, *xt.shape[1:3])

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        d, n = self.width, flops.tokens(self, height, width)
        blocks = self.depth * (
            flops.block(d, n, self.mlp_ratio) + flops.cross(d, n, text, d)
        )
        return float(
            blocks + flops.modulated(self) + flops.ends(self, n, text, text_dim)
        )


class DiTBlock(DenoiserBlock):
    """Self-attention and MLP with adaLN-zero; the identity at initialisation.

    With `text`, there is a cross-attention between the two.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        c: Float[Array, "b d"],
        text: Float[Array, "b l d"] | None = None,
    ) -> Float[Array, "b n d"]:
        modulation = Modulation(6, x.shape[-1], self.dtype, name="adaln")(c)
        modulation = jnp.unstack(modulation, axis=1)  # 6 of (b, d)
        shift, scale, gate = modulation[:3]
        h = self.self_attention(modulate(layer_norm(x), shift, scale))
        x = cut(x + gate[:, None] * h)
        if text is not None:
            x = cut(x + self.cross_attention(x, text))  # no norm, no gate, as in PixArt
        shift, scale, gate = modulation[3:]
        mlp = Mlp(self.mlp_ratio, dtype=self.dtype, name="mlp")
        h = mlp(modulate(layer_norm(x), shift, scale))
        # Saved by remat: the gate's gradient needs it, and fc2 would run again for it.
        return cut(x + gate[:, None] * checkpoint_name(h, "fed"))
