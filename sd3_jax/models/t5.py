"""T5 1.1 encoder (Raffel et al. 2020; Shazeer 2020), and a small byte-level one."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from sd3_jax.models.attention.attention import attention
from sd3_jax.models.layers import Dense, RmsNorm, normal
from sd3_jax.models.token_table import token_states

PAD = 0  # of ByT5's ids; 1 ends, and byte b is b + 3


class T5Encoder(nn.Module):
    """Token ids (b, l) to states (b, l, d).

    `mask` is true for keys that are attended to. The released models take none: there
    padding is attended to as well. `added` is the number of rows of textual inversion,
    whose ids begin at `vocab`.
    """

    vocab: int
    depth: int
    width: int
    num_heads: int
    head_size: int
    mlp: int
    unroll: int = 1
    added: int = 0
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b l"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        init = nn.with_logical_partitioning(normal(1.0), ("vocab", "embed"))
        table = self.param("embedding", init, (self.vocab, self.width))
        # No factor sqrt(width), and no position table: positions enter by the bias.
        x = token_states(self, table, ids, self.added).astype(self.dtype)  # (b, l, d)
        return T5Stack(
            self.depth,
            self.num_heads,
            self.head_size,
            self.mlp,
            unroll=self.unroll,
            dtype=self.dtype,
            name="stack",
        )(x, mask)


class T5Stack(nn.Module):
    """Pre-norm blocks with one relative-position bias for all, and a final norm."""

    depth: int
    num_heads: int
    head_size: int
    mlp: int
    buckets: int = 32
    max_distance: int = 128
    unroll: int = 1
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        # Wide, so that heads tell before from behind at birth: with 0.02 to 0.5 a small
        # tower learns which words there are long before in which order.
        init = nn.with_logical_partitioning(normal(2.0), (None, "heads"))
        bias = self.param("relative_bias", init, (self.buckets, self.num_heads))
        buckets = relative_buckets(x.shape[1], self.buckets, self.max_distance)
        bias = bias[buckets].transpose(2, 0, 1)[None]  # (1, heads, l, l)
        if mask is not None:
            # Finite: a row of nothing but -inf would be NaN after the softmax.
            bias = jnp.where(mask[:, None, None, :], bias, -1e9)  # (b, heads, l, l)

        def body(block, x, bias):
            return block(x, bias), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.depth,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        block = T5Block(
            self.num_heads, self.head_size, self.mlp, self.dtype, name="blocks"
        )
        x, _ = scan(block, x, bias)
        return RmsNorm(name="norm")(x)


class T5Block(nn.Module):
    """Self-attention and a gated GELU, no biases (T5 1.1)."""

    num_heads: int
    head_size: int
    mlp: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b l d"], bias: Array) -> Float[Array, "b l d"]:
        d = x.shape[-1]

        def dense(features, axes, name):
            return Dense(features, axes, bias=False, dtype=self.dtype, name=name)

        h = RmsNorm(name="norm_attn")(x)
        heads = (3, self.num_heads, self.head_size)
        qkv = dense(heads, ("embed", None, "heads", None), "to_qkv")(h)
        # T5 does not divide logits by sqrt(k): its initialisation does instead.
        h = attention(*jnp.unstack(qkv, axis=-3), bias=bias, scale=1.0)
        x = x + dense(d, ("heads", None, "embed"), "to_out")(h)

        h = RmsNorm(name="norm_mlp")(x)
        gate, h = jnp.unstack(
            dense((2, self.mlp), ("embed", None, "mlp"), "wi")(h), axis=-2
        )
        h = nn.gelu(gate, approximate=True) * h  # "gated-gelu": the tanh form
        return x + dense(d, ("mlp", "embed"), "wo")(h)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket (l, l) of each (query, key) pair (Raffel et al. 2020, sec. 2.1).

    Near distances have a bucket each, far ones share logarithmic buckets; from
    `max_distance` on all share the last.
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4  # half for keys after the query
    sign = np.where(distance > 0, half, 0)
    distance = np.abs(distance)
    # float32, as PyTorch computes it: the edges of buckets are floors of it.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = ratio / np.log(np.float32(max_distance) / np.float32(exact))
    far = exact + (far * np.float32(half - exact)).astype(np.int32)
    return sign + np.where(distance < exact, distance, np.minimum(far, half - 1))


class ByteTower(nn.Module):
    """ByT5 ids (b, l) to a context (b, words, k) and a pooled vector (b, e).

    A small text encoder to train from scratch. A word's context is the average of its
    bytes' states, so that the joint attention sees eight tokens instead of forty.
    """

    depth: int
    width: int
    num_heads: int
    words: int
    context_dim: int
    pooled_dim: int
    unroll: int = 1
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b l"]
    ) -> tuple[Float[Array, "b w k"], Float[Array, "b e"]]:
        states = T5Encoder(
            vocab=384,  # ByT5's: 3 special ids, 256 bytes, 125 sentinels
            depth=self.depth,
            width=self.width,
            num_heads=self.num_heads,
            head_size=self.width // self.num_heads,
            mlp=2 * self.width,
            unroll=self.unroll,
            dtype=self.dtype,
            name="encoder",
        )(ids, ids != PAD)
        member = words(ids, self.words).astype(self.dtype)  # (b, words, l)
        count = member.sum(-1, keepdims=True)
        present = count > 0  # (b, words, 1)
        x = jnp.einsum("bwl,bld->bwd", member, states) / jnp.maximum(count, 1)
        # The mean over words; at least 1, for a text that has none.
        mean = x.sum(1) / jnp.maximum(present.sum(1), 1)
        context = Dense(
            self.context_dim, ("embed", None), dtype=self.dtype, name="context"
        )(x)
        pooled = Dense(
            self.pooled_dim, ("embed", None), dtype=self.dtype, name="pooled"
        )(mean)
        return context * present, pooled  # slots without a word are zero


def words(ids: Int[Array, "b l"], most: int) -> Bool[Array, "b w l"]:
    """Membership (b, words, l) of bytes: runs of letters, other marks by themselves."""
    byte = ids - 3
    lower = byte | 32  # ASCII letters in lower case
    # From 128 on: parts of a UTF-8 character, which are not to be split.
    letter = ((lower >= ord("a")) & (lower <= ord("z"))) | (byte >= 128)
    mark = (byte > ord(" ")) & ~letter
    before = jnp.pad(letter, ((0, 0), (1, 0)))[:, :-1]
    index = jnp.cumsum(mark | (letter & ~before), -1) - 1  # a word starts there
    return (index[:, None] == jnp.arange(most)[:, None]) & (letter | mark)[:, None]
