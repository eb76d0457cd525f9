"""The layers every denoiser and text tower is made of; weights carry logical axes."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from sd3_jax.models import leaves, shards

zeros = nn.initializers.zeros
xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal


class Dense(nn.Module):
    """A linear map over the last axes of x, onto axes of any number.

    `axes` names the kernel's axes, those of the input first: ("embed", "mlp"), or
    ("embed", None, "heads", None) for a fused qkv. The kernel is initialised as the
    matrix it is when input and output axes are each flattened; what stands for it may
    take its place among the parameters (models/leaves.py).
    """

    features: int | Sequence[int]
    axes: Sequence[str | None]
    init: Callable = xavier
    bias: bool = True
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = np.atleast_1d(self.features).tolist()
        inputs = len(self.axes) - len(out)
        shape = x.shape[-inputs:]

        def kernel_init(key, full, dtype=jnp.float32):
            return self.init(key, (math.prod(shape), math.prod(out)), dtype).reshape(
                full
            )

        kernel_init = nn.with_logical_partitioning(kernel_init, tuple(self.axes))
        kernel = leaves.stored(self, "kernel")
        if kernel is None:
            kernel = self.param("kernel", kernel_init, (*shape, *out))
        y = leaves.product(x.astype(self.dtype), kernel, tuple(self.axes), inputs)
        if self.bias:
            bias_init = nn.with_logical_partitioning(zeros, tuple(self.axes[inputs:]))
            bias = self.param("bias", bias_init, tuple(out))
            y = y + bias.astype(self.dtype)
        return y


def remade(function: Callable) -> Callable:
    """On a CPU the backward pass keeps nothing of it but its arrays, and computes the
    rest again: that is sooner done than read from memory. Elsewhere XLA fuses it, and
    what is kept is the blocks' own choice (stack.REMAT)."""

    @functools.wraps(function)
    def call(*arrays, **options):
        chosen = functools.partial(function, **options)
        again = shards.platform() == "cpu"
        return (jax.checkpoint(chosen) if again else chosen)(*arrays)

    return call


class RmsNorm(nn.Module):
    """x / rms(x) * scale over the last axis; the mean square in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", init, x.shape[-1:])
        return rms_norm(x, scale, eps=self.eps)


@remade
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return (h * scale).astype(x.dtype)


@remade
def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Zero mean and unit variance over the last axis, no parameters, in float32."""
    h = x.astype(jnp.float32)
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return h.astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """adaLN: x (b, n, d), shift and scale (b, d)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Mlp(nn.Module):
    """Two layers with a tanh-GELU between them."""

    ratio: int = 4
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        h = Dense(self.ratio * d, ("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        h = checkpoint_name(h, "mlp")  # (b, n, ratio*d)
        h = nn.with_logical_constraint(h, ("batch", "tokens", "mlp"))
        h = gelu(h)
        return Dense(d, ("mlp", "embed"), dtype=self.dtype, name="fc2")(h)


@remade
def gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=True)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: what brings t and the pooled text to the model's width."""

    width: int
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "b k"]) -> Float[Array, "b d"]:
        init = normal(0.02)
        h = Dense(self.width, (None, "embed"), init=init, dtype=self.dtype, name="fc1")(
            x
        )
        h = nn.silu(h)
        return Dense(
            self.width, (None, "embed"), init=init, dtype=self.dtype, name="fc2"
        )(h)


def timestep_features(t: Float[Array, " b"], size: int = 256) -> Float[Array, "b k"]:
    """cos and sin of 1000 t at `size / 2` frequencies from 1 to 1e-4, in float32."""
    half = size // 2
    frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def patchify(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b n k"]:
    """Rows of p x p patches, each flattened as (p, q, c), channel fastest."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    x: Float[Array, "b n k"], p: int, h: int, w: int
) -> Float[Array, "b h w c"]:
    """The inverse of patchify, for a picture of h x w."""
    b = x.shape[0]
    x = x.reshape(b, h // p, w // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h, w, -1)


def positions(
    h: int,
    w: int,
    width: int,
    *,
    size: int,
    base: int,
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "*b n d"]:
    """A part h x w of a size x size sin-cos table, as (h * w, width), float32.

    Along each axis the table's tokens lie at (i - size/2 + base/2) * 16/base: `base`
    of them span 16 units, those of a 256-pixel image, and larger tables extend outward
    (SD3 paper, sec. 5.3.2; the released 192 and 384 tables have base 64). The part is
    its centre; or for each of b images the one whose top and left `place` gives.
    """
    check_part(h, w, size)
    if place is None:
        rows, columns = (axis_table(n, width // 2, size, base) for n in (h, w))
    else:
        whole = axis_table(size, width // 2, size, base)
        rows, columns = (
            whole[start[:, None] + jnp.arange(n)] for start, n in zip(place.T, (h, w))
        )
    shape = (*rows.shape[:-2], h, w, width // 2)
    columns = jnp.broadcast_to(columns[..., None, :, :], shape)  # x comes first
    rows = jnp.broadcast_to(rows[..., :, None, :], shape)
    return jnp.concatenate([columns, rows], -1).reshape(*shape[:-3], h * w, width)


def crop(
    table: Float[Array, "1 p d"],
    h: int,
    w: int,
    place: Int[Array, "b 2"] | None = None,
) -> Float[Array, "*b n d"]:
    """The centre h x w of a stored square table, or where `place` says: (h * w, d)."""
    size = math.isqrt(table.shape[1])
    check_part(h, w, size)
    table = table.reshape(size, size, -1)
    if place is None:
        top, left = (size - h) // 2, (size - w) // 2
        return table[top : top + h, left : left + w].reshape(h * w, -1)
    part = lambda at: jax.lax.dynamic_slice(table, (*at, 0), (h, w, table.shape[-1]))
    return jax.vmap(part)(place).reshape(len(place), h * w, -1)


def check_part(h: int, w: int, size: int) -> None:
    if h > size or w > size:
        raise ValueError(
            f"positions: {h}x{w} tokens do not fit a table of {size}x{size};"
            f" raise model.pos_size to {max(h, w)} or more"
        )


def axis_table(n: int, width: int, size: int, base: int) -> Array:
    top = (size - n) // 2
    place = (np.arange(top, top + n) - (size - base) // 2) * (16.0 / base)
    frequency = 10000.0 ** -(np.arange(width // 2) / (width // 2))
    angle = place[:, None] * frequency  # float64, as the published table was made
    table = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    return jnp.asarray(table, jnp.float32)
