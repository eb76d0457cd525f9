"""The autoencoder of 16 channels (Rombach et al. 2022; SD3 paper, sec. 5.2.1)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Key

from sd3_jax.distributed import mesh_context
from sd3_jax.models.attention.attention import attention
from sd3_jax.models.layers import Dense, zeros

LOGVAR = (-30.0, 20.0)  # clipped, as in the released code, so that exp is finite


class VAE(nn.Module):
    """KL autoencoder: images in [-1, 1] to latents 2^(levels - 1) times smaller.

    Apply it with `method="encode"` or `"decode"`; either needs only its half of the
    parameters.
    """

    channels: Sequence[int] = (128, 256, 512, 512)
    latent_channels: int = 16
    layers: int = 2  # resnets a level; the decoder has one more
    groups: int = 32
    mid_attention: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self):
        shared = dict(
            channels=tuple(self.channels),
            groups=self.groups,
            mid_attention=self.mid_attention,
            dtype=self.dtype,
        )
        out = 2 * self.latent_channels  # mean and log-variance
        self.encoder = Encoder(layers=self.layers, out=out, **shared)
        self.decoder = Decoder(layers=self.layers + 1, out=3, **shared)

    def encode(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
        """Moments (b, h, w, k), float32: mean, then log-variance, on the last axis."""
        return self.encoder(image).astype(jnp.float32)

    def decode(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Images (b, H, W, 3) of about [-1, 1], not clipped, in float32."""
        return self.decoder(z).astype(jnp.float32)

    def __call__(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        return self.decode(posterior(self.encode(image))[0])


def posterior(moments: Float[Array, "*b h w k"]) -> tuple[Array, Array]:
    """(mean, std), each (*b, h, w, k/2), of an image's latent."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR))


def sample(
    key: Key[Array, ""], moments: Float[Array, "*b h w k"]
) -> Float[Array, "*b h w c"]:
    """A latent (*b, h, w, k/2) drawn from the moments' Gaussian."""
    mean, std = posterior(moments)
    return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def to_latents(z: Array, *, scaling: float | Array, shift: float | Array) -> Array:
    """Shifted and scaled latents, about zero mean and unit variance, to denoise."""
    return (z - shift) * scaling


def from_latents(x0: Array, *, scaling: float | Array, shift: float | Array) -> Array:
    """The inverse of to_latents."""
    return x0 / scaling + shift


class Encoder(nn.Module):
    """Images to moments: residual blocks and stride-2 convolutions."""

    channels: Sequence[int]
    layers: int
    out: int
    groups: int
    mid_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w k"]:
        conv = lambda out, name, **kw: Conv(out, dtype=self.dtype, name=name, **kw)
        h = conv(self.channels[0], "conv_in")(spread(x))  # (b, H, W, c0)
        for i, out in enumerate(self.channels):
            for j in range(self.layers):
                name = f"down_{i}_resnet_{j}"
                h = Resnet(out, self.groups, self.dtype, name=name)(h)
            if i < len(self.channels) - 1:
                # Right and bottom only, as the released model was trained.
                h = jnp.pad(h, ((0, 0), (0, 1), (0, 1), (0, 0)))
                h = conv(out, f"down_{i}_conv", stride=2)(h)  # (b, h/2, w/2, out)
        h = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(h)
        # --- moments
        h = nn.silu(GroupNorm(self.groups, name="norm_out")(h))
        return conv(self.out, "conv_out")(h)


class Decoder(nn.Module):
    """Latents to images: residual blocks and nearest-neighbour upsampling."""

    channels: Sequence[int]
    layers: int
    out: int
    groups: int
    mid_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
        conv = lambda out, name: Conv(out, dtype=self.dtype, name=name)
        h = conv(self.channels[-1], "conv_in")(spread(z))
        h = Middle(self.groups, self.mid_attention, self.dtype, name="mid")(h)
        for i, out in enumerate(reversed(self.channels)):
            for j in range(self.layers):
                h = Resnet(out, self.groups, self.dtype, name=f"up_{i}_resnet_{j}")(h)
            if i < len(self.channels) - 1:
                h = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)  # (b, 2h, 2w, c)
                h = conv(out, f"up_{i}_conv")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm_out")(h))
        return conv(self.out, "conv_out")(h)


class Middle(nn.Module):
    """Two residual blocks, with the model's only attention between them."""

    groups: int
    attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        x = Resnet(c, self.groups, self.dtype, name="resnet_0")(x)
        if self.attention:
            x = SelfAttention(self.groups, self.dtype, name="attn")(x)
        return Resnet(c, self.groups, self.dtype, name="resnet_1")(x)


class Resnet(nn.Module):
    """Norm, SiLU, convolution, twice, plus the input."""

    features: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        h = nn.silu(GroupNorm(self.groups, name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = nn.silu(GroupNorm(self.groups, name="norm2")(h))
        h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:  # a 1 x 1 convolution changes the width
            x = Conv(self.features, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """Attention among all pixels, with a single head as wide as the channels."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        b, height, width, c = x.shape
        h = GroupNorm(self.groups, name="norm")(x).reshape(b, height * width, c)
        axes = (None, None, "embed")
        dense = lambda name: Dense((1, c), axes, dtype=self.dtype, name=name)
        q, k, v = (dense(name)(h) for name in ("to_q", "to_k", "to_v"))  # (b, n, 1, c)
        # Queries are sharded; each of them reads all keys and values.
        q, k, v = spread(q), spread(k, height=None), spread(v, height=None)
        h = attention(q, k, v).reshape(b, height, width, c)  # one head: (b, n, 1, c)
        return x + Dense(c, ("embed", None), dtype=self.dtype, name="to_out")(h)


class Conv(nn.Module):
    """A square convolution, padded for stride 1 and not for stride 2."""

    features: int
    size: int = 3
    stride: int = 1
    init: Callable = nn.initializers.lecun_normal()
    height: str | None = "height"  # logical axis of the output's height; None: whole
    bias: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        shape = (self.size, self.size, x.shape[-1], self.features)
        init = nn.with_logical_partitioning(self.init, (None, None, None, "embed"))
        kernel = self.param("kernel", init, shape)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            "SAME" if self.stride == 1 else "VALID",  # the caller pads for stride 2
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        if self.bias:
            bias_init = nn.with_logical_partitioning(zeros, (None,))
            bias = self.param("bias", bias_init, (self.features,))
            y = y + bias.astype(self.dtype)
        return spread(y, height=self.height)


def spread(x: Float[Array, "b h *_"], *, height: str | None = "height") -> Array:
    """Shard heights over the mesh axes that the batch leaves free, to share memory.

    A batch that does not divide, such as one large image, leaves them all free.
    Convolutions then exchange the rows at the shards' borders.
    """
    # With rows None, "height" takes the batch's mesh axes too.
    rows = "batch" if len(x) % mesh_context.parts("batch")[0] == 0 else None
    axes = (rows, height, *[None] * (x.ndim - 2))
    if x.shape[1] % mesh_context.parts(*axes)[1]:
        return x
    return nn.with_logical_constraint(x, axes)


class GroupNorm(nn.Module):
    """Zero mean and unit variance over each group of channels, in float32."""

    groups: int
    eps: float = 1e-6  # PyTorch's default is 1e-5; the released model has this

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        names = lambda init: nn.with_logical_partitioning(init, (None,))
        scale = self.param("scale", names(nn.initializers.ones), (c,))
        bias = self.param("bias", names(zeros), (c,))
        h = x.astype(jnp.float32).reshape(*x.shape[:3], self.groups, -1)
        # (b, h, w, g, c/g); centred first, since E[x^2] - E[x]^2 cancels
        h = h - jnp.mean(h, (1, 2, 4), keepdims=True)
        variance = jnp.mean(jnp.square(h), (1, 2, 4), keepdims=True)
        h = (h * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (h * scale + bias).astype(x.dtype)
