"""CLIP's text tower: OpenAI's L and OpenCLIP's bigG (Radford et al. 2021)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sd3_jax.models.attention.attention import attention
from sd3_jax.models.layers import Dense, normal, zeros

LEGACY_EOS = 2  # in a config: the end is where the largest id is
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class ClipText(nn.Module):
    """Token ids to the states that SD3 attends to, and a pooled vector.

    A causal mask and no other. `eos` is the config's eos_token_id: LEGACY_EOS, or the
    id whose first place ends a text.
    """

    vocab: int
    depth: int
    width: int
    num_heads: int
    mlp: int
    projection: int
    activation: str
    eos: int = LEGACY_EOS
    length: int = 77
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b l"], *, clip_skip: int = 0
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
        """(states of the layer `clip_skip` before the last but one, pooled).

        The states have not been through the final norm; the pooled vector has, at the
        end of the text, and through the projection.
        """
        named = lambda init, axes: nn.with_logical_partitioning(init, axes)
        init = named(normal(0.02), ("vocab", "embed"))
        tokens = self.param("tokens", init, (self.vocab, self.width))
        init = named(normal(0.01), (None, "embed"))
        places = self.param("positions", init, (self.length, self.width))
        x = (jnp.take(tokens, ids, axis=0) + places[: ids.shape[1]]).astype(self.dtype)
        block = ClipBlock(
            self.num_heads, self.mlp, self.activation, self.dtype, name="blocks"
        )
        last = self.depth - 2 - clip_skip  # 0-based layer whose output is returned
        if not 0 <= last < self.depth:
            raise ValueError(f"clip_skip {clip_skip}: wanted 0 to {self.depth - 2}")

        def body(block, carry, layer):
            x, hidden = carry
            x = block(x)
            return (x, jnp.where(layer == last, x, hidden)), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        (x, hidden), _ = scan(block, (x, x), jnp.arange(self.depth))
        x = LayerNorm(name="final_norm")(x)
        pooled = x[jnp.arange(len(ids)), end_of_text(ids, self.eos)]
        project = Dense(
            self.projection,
            ("embed", None),
            bias=False,
            dtype=self.dtype,
            name="text_projection",
        )
        return hidden, project(pooled)


class ClipBlock(nn.Module):
    """Attention and an MLP, each after a norm; a text's looks back only."""

    num_heads: int
    mlp: int
    activation: str
    dtype: DTypeLike
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        d, n = x.shape[-1], x.shape[1]
        dense = lambda features, axes, name: Dense(
            features, axes, dtype=self.dtype, name=name
        )
        heads = (3, self.num_heads, d // self.num_heads)
        h = LayerNorm(name="norm1")(x)
        qkv = dense(heads, ("embed", None, "heads", None), "to_qkv")(h)
        back = jnp.where(jnp.tri(n, dtype=bool), 0.0, -jnp.inf)[None, None]
        bias = back if self.causal else None
        h = attention(*jnp.unstack(qkv, axis=-3), bias=bias)
        x = x + dense(d, ("heads", None, "embed"), "to_out")(h)
        h = dense(self.mlp, ("embed", "mlp"), "fc1")(LayerNorm(name="norm2")(x))
        return x + dense(d, ("mlp", "embed"), "fc2")(ACTIVATIONS[self.activation](h))


class LayerNorm(nn.Module):
    """With scale and bias, its statistics in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        names = lambda init: nn.with_logical_partitioning(init, (None,))
        scale = self.param("scale", names(nn.initializers.ones), x.shape[-1:])
        bias = self.param("bias", names(zeros), x.shape[-1:])
        h = x.astype(jnp.float32)
        h = h - jnp.mean(h, -1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + self.eps)
        return (h * scale + bias).astype(x.dtype)


def end_of_text(ids: Int[Array, "b l"], eos: int) -> Int[Array, " b"]:
    """Where each text ends: the first `eos`, or by the legacy rule the largest id."""
    return jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)
