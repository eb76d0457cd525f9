"""Layers of the denoisers and text encoders; weights carry logical axis names."""

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
    """A linear map from the last axes of x to one or more output axes.

    `axes` names the kernel's logical axes, inputs first: ("embed", "mlp"), or
    ("embed", None, "heads", None) for a fused qkv. A LoRA or an eight-bit weight may
    take the kernel's place among the parameters (params/parametrization.py).
    """

    features: int | Sequence[int]
    axes: Sequence[str | None]
    init: Callable = xavier
    bias: bool = True
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = np.atleast_1d(self.features).tolist()  # the output axes
        inputs = len(self.axes) - len(out)  # how many axes of x are contracted
        shape = x.shape[-inputs:]

        # Fan-in and fan-out are those of the flat matrix: of a fused qkv (d, 3, a, k)
        # xavier would take a for the inputs, and d and 3 as receptive field.
        def kernel_init(key, full, dtype=jnp.float32):
            return self.init(key, (math.prod(shape), math.prod(out)), dtype).reshape(
                full
            )

        kernel_init = nn.with_logical_partitioning(kernel_init, tuple(self.axes))
        # flax would compare what stands for a kernel with the kernel's shape.
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
        return y  # (b, ..., *out)


def remade(function: Callable) -> Callable:
    """Rematerialise `function` on a CPU: its backward pass keeps only the arguments.

    XLA's CPU backend cannot fuse several outputs into one loop, so recomputing is
    faster than reloading. Elsewhere XLA fuses it, and the blocks' policy decides what
    is kept (scan.REMAT).
    """

    @functools.wraps(function)
    def call(*arrays, **options):
        chosen = functools.partial(function, **options)
        again = mesh_context.platform() == "cpu"
        return (jax.checkpoint(chosen) if again else chosen)(*arrays)

    return call


class RmsNorm(nn.Module):
    """x / rms(x) * scale over the last axis (Zhang & Sennrich 2019), in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones, (None,))
        scale = self.param("scale", init, x.shape[-1:])
        return rms_norm(x, scale, eps=self.eps)


@remade
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    h = x.astype(jnp.float32)  # a mean of squares in bfloat16 keeps 8 bits
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return (h * scale).astype(x.dtype)


@remade
def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Layer norm over the last axis without scale and bias, in float32."""
    h = x.astype(jnp.float32)
    # Centred first: E[x^2] - E[x]^2 cancels where the mean is large.
    h = h - jnp.mean(h, -1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + eps)
    return h.astype(x.dtype)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """adaLN (Peebles & Xie 2023): x (b, n, d), shift and scale (b, d)."""
    # 1 + scale: a layer whose outputs are zero at initialisation leaves x as it is.
    return x * (1 + scale[:, None]) + shift[:, None]


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


class Mlp(nn.Module):
    """Two layers with a tanh-GELU between them."""

    ratio: int = 4
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        d = x.shape[-1]
        h = Dense(self.ratio * d, ("embed", "mlp"), dtype=self.dtype, name="fc1")(x)
        # Before the GELU, so that remat "mlp" keeps what its backward pass needs.
        h = checkpoint_name(h, "mlp")  # (b, n, ratio*d)
        h = nn.with_logical_constraint(h, ("batch", "tokens", "mlp"))
        h = gelu(h)
        return Dense(d, ("mlp", "embed"), dtype=self.dtype, name="fc2")(h)


@remade
def gelu(x: Array) -> Array:
    return nn.gelu(x, approximate=True)


class Embedder(nn.Module):
    """Linear, SiLU, Linear: embeds t or the pooled text (b, k) as (b, width)."""

    width: int
    dtype: DTypeLike = jnp.bfloat16

    @nn.compact
    def __call__(self, x: Float[Array, "b k"]) -> Float[Array, "b d"]:
        init = normal(0.02)  # as DiT initialises its timestep MLP
        h = Dense(self.width, (None, "embed"), init=init, dtype=self.dtype, name="fc1")(
            x
        )
        h = nn.silu(h)
        return Dense(
            self.width, (None, "embed"), init=init, dtype=self.dtype, name="fc2"
        )(h)


def timestep_features(t: Float[Array, " b"], size: int = 256) -> Float[Array, "b k"]:
    """cos and sin of 1000 t at `size / 2` frequencies from 1 to 1e-4, in float32.

    Ho et al. 2020; 1000 t is the step number that the published models were given.
    """
    half = size // 2
    frequency = jnp.exp(-jnp.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    # float32: bfloat16 has 8 bits, and would merge neighbouring steps of 1000.
    angle = 1000.0 * t.astype(jnp.float32)[:, None] * frequency  # (b, size/2)
    # cos first, as in DiT's code: diffusers' flip_sin_to_cos.
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


def condition(
    t: Float[Array, " b"], pooled: Float[Array, "b e"], width: int, dtype: DTypeLike
) -> Float[Array, "b d"]:
    """The condition (b, d) of every adaLN: embedded time plus embedded pooled text."""
    # Features of t are float32: see timestep_features.
    t = Embedder(width, dtype=dtype, name="time_embed")(timestep_features(t))
    y = Embedder(width, dtype=dtype, name="pooled_embed")(pooled)
    # The SiLU that opens every adaLN, once for all of them.
    return nn.silu(t + y)


def patchify(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b n k"]:
    """Rows of p x p patches, each flattened as (p, q, c), channel fastest."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    # (b, h/p, w/p, p, p, c)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(
    x: Float[Array, "b n k"], p: int, h: int, w: int
) -> Float[Array, "b h w c"]:
    """The inverse of patchify, for images of h x w."""
    b = x.shape[0]
    x = x.reshape(b, h // p, w // p, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    # (b, h/p, p, w/p, p, c)
    return x.reshape(b, h, w, -1)


def cut(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Shard tokens over the mesh's context axis."""
    return nn.with_logical_constraint(x, ("batch", "tokens", None))


def whole(x: Float[Array, "b n a k"]) -> Float[Array, "b n a k"]:
    """Keys or values with all tokens on every device, since every query reads all."""
    return nn.with_logical_constraint(x, ("batch", None, "heads", None))
