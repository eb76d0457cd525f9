"""CLIP's text tower: OpenAI's L and OpenCLIP's bigG (Radford et al. 2021)."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from sd3_jax.models.attention.attention import attention
from sd3_jax.models.layers import Dense, normal, zeros
from sd3_jax.models.token_table import token_states

# Published configs say eos_token_id 2, which was never CLIP's end token: with it, as
# in transformers, a text ends at its largest id (49407 in CLIP's vocabulary).
LEGACY_EOS = 2
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP-L
    "gelu": lambda x: nn.gelu(x, approximate=False),  # OpenCLIP's bigG
}


class ClipText(nn.Module):
    """Token ids to hidden states and a pooled vector (Radford et al. 2021).

    The mask is causal: padding is attended to. `eos` is the config's eos_token_id:
    LEGACY_EOS, or the id whose first occurrence ends a text. `added` is the number of
    rows of textual inversion, whose ids begin at `vocab`.
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
    added: int = 0
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "b l"],
        mask: Bool[Array, "b l"] | None = None,
        *,
        clip_skip: int = 0,
    ) -> tuple[Float[Array, "b l d"], Float[Array, "b e"]]:
        """(hidden states, pooled vector); `mask` is true for keys that are attended to.

        The states are those of the last layer but one, or of `clip_skip` layers before
        it, without the final norm (SD3 paper, sec. 4). The pooled vector is the last
        layer's state at the end of the text, normalised and projected. Raises
        ValueError if the model has no such layer.
        """
        named = lambda init, axes: nn.with_logical_partitioning(init, axes)
        init = named(normal(0.02), ("vocab", "embed"))
        tokens = self.param("tokens", init, (self.vocab, self.width))
        init = named(normal(0.01), (None, "embed"))
        places = self.param("positions", init, (self.length, self.width))
        # The sum is in the parameters' dtype, the blocks compute in `dtype`.
        x = token_states(self, tokens, ids, self.added) + places[: ids.shape[1]]
        x = x.astype(self.dtype)  # (b, l, d)
        block = ClipBlock(
            self.num_heads, self.mlp, self.activation, self.dtype, name="blocks"
        )
        last = self.depth - 2 - clip_skip  # 0-based layer whose output is returned
        if not 0 <= last < self.depth:
            raise ValueError(f"clip_skip {clip_skip}: expected 0 to {self.depth - 2}")

        # One layer's states ride in the carry: to stack those of every layer as the
        # scan's output would take `depth` times the memory.
        def body(block, carry, layer):
            x, hidden = carry
            x = block(x, mask)
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
        pooled = x[jnp.arange(len(ids)), end_of_text(ids, self.eos)]  # (b, d)
        project = Dense(
            self.projection,
            ("embed", None),
            bias=False,
            dtype=self.dtype,
            name="text_projection",
        )
        return hidden, project(pooled)


class ClipBlock(nn.Module):
    """A pre-norm transformer block; `causal` for text, False for images."""

    num_heads: int
    mlp: int
    activation: str
    dtype: DTypeLike
    causal: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], keys: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        d, n = x.shape[-1], x.shape[1]
        dense = lambda features, axes, name: Dense(
            features, axes, dtype=self.dtype, name=name
        )
        heads = (3, self.num_heads, d // self.num_heads)
        h = LayerNorm(name="norm1")(x)
        axes = ("embed", None, "heads", None)
        qkv = dense(heads, axes, "to_qkv")(h)  # (b, l, 3, a, k)
        mask = jnp.where(jnp.tri(n, dtype=bool), 0.0, -jnp.inf)[None, None]
        if keys is not None:
            mask = jnp.where(keys[:, None, None, :], mask, -jnp.inf)  # (b, 1, l, l)
        bias = mask if self.causal else None  # (1, 1, l, l)
        h = attention(*jnp.unstack(qkv, axis=-3), bias=bias)  # (b, l, a, k)
        x = x + dense(d, ("heads", None, "embed"), "to_out")(h)
        h = dense(self.mlp, ("embed", "mlp"), "fc1")(LayerNorm(name="norm2")(x))
        return x + dense(d, ("mlp", "embed"), "fc2")(ACTIVATIONS[self.activation](h))


class LayerNorm(nn.Module):
    """Layer norm with scale and bias; mean and variance in float32."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        names = lambda init: nn.with_logical_partitioning(init, (None,))
        scale = self.param("scale", names(nn.initializers.ones), x.shape[-1:])
        bias = self.param("bias", names(zeros), x.shape[-1:])
        h = x.astype(jnp.float32)  # in bfloat16 the mean square loses too many bits
        h = h - jnp.mean(h, -1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + self.eps)
        return (h * scale + bias).astype(x.dtype)


def end_of_text(ids: Int[Array, "b l"], eos: int) -> Int[Array, " b"]:
    """Index of each text's end: its first `eos`, or by the legacy rule its largest id.

    0 for a text without `eos`.
    """
    # argmax takes the first of equals: padding with the end token changes nothing.
    return jnp.argmax(ids if eos == LEGACY_EOS else ids == eos, axis=-1)
