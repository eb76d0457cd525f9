"""A U-Net of convolutions and transformers with cross-attention to the text."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from sd3_jax.models import flops, vae
from sd3_jax.models.clip import LayerNorm
from sd3_jax.models.denoiser import Denoiser
from sd3_jax.models.denoiser_blocks import DenoiserBlock, block_options
from sd3_jax.models.layers import Dense, condition, cut, patchify, unpatchify, zeros
from sd3_jax.models.scan import REMAT
from sd3_jax.models.vae import Conv, spread


class UNet(Denoiser):
    """The U-Net of Stable Diffusion 2.1 (Rombach et al. 2022), the defaults its sizes.

    Level i has width * multipliers[i] channels and half the height and width of level
    i - 1. It has `depth` blocks on the way down and depth + 1 on the way up; those of
    the levels in `attended`, and the middle, have a transformer. Heads are equally wide
    at every level; `num_heads` is the first level's. The embedded pooled text is added
    to the time, as in SDXL. With `patch` over 1, patches become channels first.
    `qk_norm` is an addition. Over the mesh's axes context and tensor only transformers
    are sharded, not convolutions.
    """

    depth: int = 2
    width: int = 320
    num_heads: int = 5
    patch: int = 1
    channels: int = 4
    qk_norm: bool = False
    multipliers: Sequence[int] = (1, 2, 4, 4)
    attended: Sequence[int] = (0, 1, 2)

    def velocity(self, xt: Array, t: Array, context: Array, pooled: Array) -> Array:
        # --- condition and first convolution
        c = condition(t, pooled, 4 * self.width, self.dtype)
        conv = functools.partial(convolution, self.dtype)
        x = by_rows(fold(xt, self.patch))
        x = conv(self.width, "conv_in")(x)
        skips, last = [x], len(self.multipliers) - 1
        # --- down: every block's output is a skip, and every downsampling's
        for level in range(last + 1):
            for i in range(self.depth):
                x = self.level_block(level, f"down_{level}_block_{i}")(x, c, context)
                skips.append(x)
            if level < last:
                # Padded on both sides, as PyTorch does; "SAME" of stride 2 is not.
                x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                x = conv(x.shape[-1], f"down_{level}_conv", stride=2)(x)
                skips.append(x)
        # --- middle: one block with a transformer, one without
        for i, attends in enumerate((True, False)):
            x = self.level_block(last, f"mid_block_{i}", attends)(x, c, context)
        # --- up: skips in reverse
        for level in reversed(range(last + 1)):
            for i in range(self.depth + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self.level_block(level, f"up_{level}_block_{i}")(x, c, context)
            if level:
                # Nearest neighbours, (b, 2h, 2w, d).
                x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
                x = conv(x.shape[-1], f"up_{level}_conv")(x)
        # --- velocity, zero at initialisation
        x = nn.silu(group_norm(x, "norm_out"))
        x = conv(self.patch**2 * self.channels, "conv_out", init=zeros)(x)
        x = x.reshape(len(x), -1, x.shape[-1])  # (b, n, p*p*c)
        return unpatchify(x, self.patch, *xt.shape[1:3])

    @property
    def unit(self) -> int:
        # Each level but the first has half the height and width of the one before.
        return self.patch * 2 ** (len(self.multipliers) - 1)

    def level_block(
        self, level: int, name: str, attends: bool | None = None
    ) -> nn.Module:
        # No scan: blocks differ in shape. Remat is by block all the same.
        kind = Block
        if self.remat != "none":
            kind = nn.remat(Block, policy=REMAT[self.remat])
        times = self.multipliers[level]
        return self.block(
            kind,
            name,
            num_heads=self.num_heads * times,
            features=self.width * times,
            transformer=level in self.attended if attends is None else attends,
        )

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        last, e = len(self.multipliers) - 1, 4 * self.width
        sizes = [self.width * times for times in self.multipliers]
        points = [  # pixels of each level
            height * width // (self.patch * 2**level) ** 2 for level in range(last + 1)
        ]

        def conv(level, inputs, out, size=3):
            return 2 * size**2 * inputs * out * points[level]

        def one(level, inputs, attends):
            d, n = sizes[level], points[level]
            total = conv(level, inputs, d) + conv(level, d, d) + 2 * e * d
            total += conv(level, inputs, d, 1) if inputs != d else 0
            if attends:  # proj_in and proj_out; GEGLU is a half more than an MLP
                total += 2 * 2 * d**2 * n + flops.block(d, n, 1.5 * self.mlp_ratio)
                total += flops.cross(d, n, text, text_dim)
            return total

        # Embedder of time, and the second layer of the pooled text's.
        vectors = 2 * (256 + 2 * e) * e
        ends = 2 * conv(0, self.patch**2 * self.channels, self.width)
        total, at = vectors + ends, self.width
        skips = [at]  # channels, pushed on the way down and popped on the way up
        for level in range(last + 1):
            for _ in range(self.depth):
                total, at = total + one(level, at, level in self.attended), sizes[level]
                skips.append(at)
            if level < last:
                total += conv(level + 1, at, at)
                skips.append(at)
        total += one(last, at, True) + one(last, at, False)
        for level in reversed(range(last + 1)):
            for _ in range(self.depth + 1):
                total += one(level, at + skips.pop(), level in self.attended)
                at = sizes[level]
            if level:
                total += conv(level - 1, at, at)  # after upsampling
        return float(total)


def fold(x: Float[Array, "b h w c"], p: int) -> Float[Array, "b h2 w2 c2"]:
    """Patches of p x p as p^2 times the channels: (b, h/p, w/p, p*p*c)."""
    b, h, w, _ = x.shape
    return patchify(x, p).reshape(b, h // p, w // p, -1)


def convolution(dtype: DTypeLike, features: int, name: str, **options) -> Conv:
    # height=None: see by_rows.
    return Conv(features, height=None, dtype=dtype, name=name, **options)


def by_rows(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Shard images over the mesh's batch axes alone."""
    # The autoencoder also shards heights. XLA's partitioner gets some gradients of such
    # convolutions wrong, and this model is trained.
    return spread(x, height=None)


def group_norm(x: Float[Array, "b h w c"], name: str) -> Float[Array, "b h w c"]:
    """Group norm with at most 32 groups of at least two channels."""
    # Groups of one channel would subtract again what the time adds to each channel.
    groups = next(n for n in (32, 16, 8, 4, 2, 1) if x.shape[-1] % (2 * n) == 0)
    return vae.GroupNorm(groups, name=name)(x)


class Block(DenoiserBlock, kw_only=True):
    """A residual block conditioned on time, then a transformer where there is one."""

    features: int
    transformer: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        c: Float[Array, "b e"],
        text: Float[Array, "b l k"],
    ) -> Float[Array, "b h w d"]:
        x = Resnet(self.features, self.dtype, name="resnet")(x, c)
        if not self.transformer:
            return x
        transformer = Transformer(**block_options(self), name="transformer")
        return transformer(x, text)


class Resnet(nn.Module):
    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], c: Float[Array, "b e"]
    ) -> Float[Array, "b h w d"]:
        conv = functools.partial(convolution, self.dtype, self.features)
        h = conv("conv1")(nn.silu(group_norm(x, "norm1")))
        time = Dense(self.features, ("embed", None), dtype=self.dtype, name="time")
        h = h + time(c)[:, None, None]  # (b, 1, 1, d) over all pixels
        h = conv("conv2", init=zeros)(nn.silu(group_norm(h, "norm2")))
        if x.shape[-1] != self.features:
            x = conv("shortcut", size=1)(x)
        return x + checkpoint_name(h, "fed")


class Transformer(DenoiserBlock):
    """Self-attention, cross-attention and GEGLU (Shazeer 2020) between linear maps.

    Pixels are tokens, without position embeddings: convolutions know where they are.
    Zero at initialisation, so that the block starts as its input.
    """

    @nn.compact
    def __call__(
        self, picture: Float[Array, "b h w d"], text: Float[Array, "b l k"]
    ) -> Float[Array, "b h w d"]:
        b, h, w, d = picture.shape
        dense = lambda features, axes, name, **init: Dense(
            features, axes, dtype=self.dtype, name=name, **init
        )
        x = group_norm(picture, "norm").reshape(b, h * w, d)  # (b, n, d)
        # `cut` shards tokens over context; by_rows below undoes it for convolutions.
        x = cut(dense(d, (None, "embed"), "proj_in")(x))
        x = cut(x + self.self_attention(LayerNorm(name="norm1")(x)))
        x = cut(x + self.cross_attention(LayerNorm(name="norm2")(x), text))
        wide = dense((2, self.mlp_ratio * d), ("embed", None, "mlp"), "wi")
        gate, y = jnp.unstack(wide(LayerNorm(name="norm3")(x)), axis=-2)  # (b, n, r*d)
        y = checkpoint_name(y * nn.gelu(gate), "mlp")
        x = x + checkpoint_name(dense(d, ("mlp", "embed"), "wo")(y), "fed")
        x = dense(d, ("embed", None), "proj_out", init=zeros)(cut(x))  # (b, n, d)
        return by_rows(picture + x.reshape(b, h, w, d))
