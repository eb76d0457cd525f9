"""What all denoisers share: sizes, condition, tokens in and velocity out."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from sd3_jax.models.denoiser_blocks import block_options
from sd3_jax.models.layers import (
    Dense,
    Modulation,
    condition,
    cut,
    layer_norm,
    modulate,
    patchify,
    unpatchify,
    zeros,
)
from sd3_jax.models.position_table import position_table
from sd3_jax.models.scan import scanned


class Denoiser(nn.Module):
    """A map from (xt, t, context, pooled) to a velocity.

    A subclass defines `velocity`, which may use the helpers below, and `flops`. The
    helpers make submodules, so call them from `velocity` alone: flax then files the
    weights under the names given here, which are the same in every denoiser.
    """

    depth: int
    width: int
    num_heads: int
    patch: int = 2
    channels: int = 16
    mlp_ratio: int = 4
    qk_norm: bool = True
    dtype: DTypeLike = jnp.bfloat16
    remat: str = "full"
    attention: str = "auto"
    context_attention: str = "gather"

    # flax allows one compact method a class. It is this one, whose check all denoisers
    # share; the submodules that `velocity` and the helpers make belong to it too.
    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l k"],
        pooled: Float[Array, "b e"],
        **options,
    ) -> Float[Array, "b h w c"]:
        """The velocity (b, h, w, c) at (xt, t), in float32.

        `options` are keyword arguments of the subclass's `velocity`. Raises ValueError
        unless `unit` divides height and width.
        """
        _, h, w, _ = xt.shape
        if h % self.unit or w % self.unit:
            raise ValueError(
                f"{type(self).__name__}: latents of {h}x{w}: expected sides that"
                f" {self.unit} divides"
            )
        # float32, whatever `dtype` is: losses and solvers compute in float32.
        return self.velocity(xt, t, context, pooled, **options).astype(jnp.float32)

    def velocity(
        self, xt: Array, t: Array, context: Array, pooled: Array, **options
    ) -> Array:
        """__call__'s velocity, in any dtype."""
        raise NotImplementedError

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        """Operations of one image's forward pass: see models/flops.py.

        `height` and `width` are in latents; `text` tokens have width `text_dim`.
        """
        raise NotImplementedError

    @property
    def unit(self) -> int:
        """The factor that must divide a latent's height and width."""
        return self.patch

    def block(self, kind: type[nn.Module], name: str, **options) -> nn.Module:
        """A block with the denoiser's options, which `options` may replace."""
        return kind(**block_options(self) | options, name=name)


class TokenDenoiser(Denoiser):
    """A denoiser whose image is a sequence of patches with sin-cos positions.

    A variable pos_embed (1, pos_size^2, width) in the collection "buffers" replaces the
    sin-cos formula where it is present.
    """

    pos_size: int = 192  # of SD3-medium; SD3.5-medium has 384
    pos_base: int = 64  # tokens that span the units of a 256-pixel image
    unroll: int = 1  # blocks an iteration of the scan; on a CPU a loop costs: use depth

    def image_tokens(
        self, xt: Float[Array, "b h w c"], place: Int[Array, "b 2"] | None = None
    ) -> Float[Array, "b n d"]:
        """Embedded patches (b, n, d) of the noised latent, with their positions."""
        h, w = xt.shape[1] // self.patch, xt.shape[2] // self.patch
        axes = (None, "embed")
        embed = Dense(self.width, axes, dtype=self.dtype, name="patch_embed")
        x = embed(patchify(xt, self.patch))  # (b, n, d)
        # Cast: float32 positions would make the whole residual stream float32.
        return cut(x + position_table(self, h, w, place).astype(x.dtype))

    def random_place(
        self, key: Key[Array, ""], shape: Sequence[int]
    ) -> Int[Array, "b 2"]:
        """Uniform places (b, 2) where latents (b, h, w, c) fit on the table."""
        b, h, w, _ = shape
        last = self.pos_size - jnp.array([h, w]) // self.patch
        return jax.random.randint(key, (b, 2), 0, last + 1)

    def text_tokens(self, context: Float[Array, "b l k"]) -> Float[Array, "b l d"]:
        """The text encoders' states (b, l, k) in the model's width (b, l, d)."""
        # No positions: those of the text encoders are in their states.
        axes = (None, "embed")
        return Dense(self.width, axes, dtype=self.dtype, name="context_embed")(context)

    def condition(
        self, t: Float[Array, " b"], pooled: Float[Array, "b e"]
    ) -> Float[Array, "b d"]:
        """Embedded time plus embedded pooled text, (b, d)."""
        return condition(t, pooled, self.width, self.dtype)

    def scanned(self, body: Callable, length: int, **options) -> Callable:
        """scan.scanned with the denoiser's remat and unroll."""
        shared = dict(remat=self.remat, unroll=self.unroll)
        return scanned(body, length, **shared, **options)

    def final_layer(
        self, x: Float[Array, "b n d"], c: Float[Array, "b d"], h: int, w: int
    ) -> Float[Array, "b h w c"]:
        """Tokens (b, n, d) to the velocity (b, h, w, c): final adaLN and linear map.

        Zero at initialisation, as DiT's final layer.
        """
        modulation = Modulation(2, self.width, self.dtype, name="final_adaln")(c)
        shift, scale = jnp.unstack(modulation, axis=1)  # (b, d)
        x = modulate(layer_norm(x), shift, scale)
        out = self.patch**2 * self.channels
        x = Dense(out, ("embed", None), init=zeros, dtype=self.dtype, name="final")(x)
        return unpatchify(x, self.patch, h, w)  # from (b, n, p*p*c)
