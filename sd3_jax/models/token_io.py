"""Tokens from images and text, and velocities from tokens, for all denoisers.

Called inside a denoiser's compact method: the submodules belong to the caller.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sd3_jax.models.layers import (
    Dense,
    Embedder,
    layer_norm,
    modulate,
    patchify,
    timestep_features,
    unpatchify,
    zeros,
)
from sd3_jax.models.position_table import position_table


def image_tokens(
    model: nn.Module,
    xt: Float[Array, "b h w c"],
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "b n d"]:
    """Embedded patches (b, n, d) of the noised latent, with their positions."""
    h, w = xt.shape[1] // model.patch, xt.shape[2] // model.patch
    axes = (None, "embed")
    embed = Dense(model.width, axes, dtype=model.dtype, name="patch_embed")
    x = embed(patchify(xt, model.patch))  # (b, n, d)
    return cut(x + position_table(model, h, w, place).astype(x.dtype))


def text_tokens(
    model: nn.Module, context: Float[Array, "b l k"]
) -> Float[Array, "b l d"]:
    """The text encoders' states (b, l, k) in the model's width (b, l, d)."""
    axes = (None, "embed")
    return Dense(model.width, axes, dtype=model.dtype, name="context_embed")(context)


def condition(
    t: Float[Array, " b"], pooled: Float[Array, "b e"], width: int, dtype: DTypeLike
) -> Float[Array, "b d"]:
    """The condition (b, d) of every adaLN: embedded time plus embedded pooled text."""
    # Features of t are float32: see timestep_features.
    t = Embedder(width, dtype=dtype, name="time_embed")(timestep_features(t))
    y = Embedder(width, dtype=dtype, name="pooled_embed")(pooled)
    # The SiLU that opens every adaLN, once for all of them.
    return nn.silu(t + y)


def velocity(
    model: nn.Module,
    x: Float[Array, "b n d"],
    c: Float[Array, "b d"],
    h: int,
    w: int,
) -> Float[Array, "b h w c"]:
    """Tokens (b, n, d) to the velocity (b, h, w, c): final adaLN and linear map.

    Zero at initialisation, as DiT's final layer. float32, whatever `model.dtype` is:
    losses and solvers compute in float32.
    """
    modulation = Modulation(2, model.width, model.dtype, name="final_adaln")(c)
    shift, scale = jnp.unstack(modulation, axis=1)  # (b, d)
    x = modulate(layer_norm(x), shift, scale)
    out = model.patch**2 * model.channels
    x = Dense(out, ("embed", None), init=zeros, dtype=model.dtype, name="final")(x)
    # (b, n, p*p*c)
    return unpatchify(x, model.patch, h, w).astype(jnp.float32)


class Modulation(nn.Module):
    """adaLN's linear layer: c (b, d) to (b, chunks, d), zero at initialisation.

    The kernel is sharded along its outputs: see sharded_linear.exchanged.
    """

    chunks: int
    width: int
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, c: Float[Array, "b d"]) -> Float[Array, "b _ d"]:
        # A third of SD3's weights are adaLN's, and c is one row an image: devices
        # exchange rows, which is far less than gathering these weights.
        axes = (None, None, "embed")
        linear = Dense(
            (self.chunks, self.width), axes, init=zeros, dtype=self.dtype, name="linear"
        )
        return linear(c)


def cut(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Shard tokens over the mesh's context axis."""
    return nn.with_logical_constraint(x, ("batch", "tokens", None))


def whole(x: Float[Array, "b n a k"]) -> Float[Array, "b n a k"]:
    """Keys or values with all tokens on every device, since every query reads all."""
    return nn.with_logical_constraint(x, ("batch", None, "heads", None))
