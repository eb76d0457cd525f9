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
from jaxtyping import Float

from sd3_jax.distributed import mesh_context
from sd3_jax.params import parametrization

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
        kernel = parametrization.stored(self, "kernel")
        if kernel is None:
            kernel = self.param("kernel", kernel_init, (*shape, *out))
        y = parametrization.product(
            x.astype(self.dtype), kernel, tuple(self.axes), inputs
        )
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
        again = mesh_context.platform() == "cpu"
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
