"""MMDiT: separate weights for image and text, one joint attention (paper, sec. 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Key

from sd3_jax.distributed import mesh_context
from sd3_jax.models.attention.attention import attention, joint_attention
from sd3_jax.models.layers import Dense, Mlp, RmsNorm, layer_norm, modulate
from sd3_jax.models.scan import scanned, stacked
from sd3_jax.models.token_io import (
    Modulation,
    condition,
    cut,
    image_tokens,
    text_tokens,
    velocity,
    whole,
)


class MMDiT(nn.Module):
    """The SD3 denoiser (paper, sec. 4): (xt, t, context, pooled) to a velocity.

    The first `dual_blocks` blocks add self-attention among image tokens (MMDiT-X of
    SD3.5-medium). With `weight_sets=3`, text tokens from `text_split` on, T5's, have
    weights of their own (sec. 5.2.3). A variable pos_embed (1, pos_size^2, width) in
    the collection "buffers" replaces the sin-cos formula where it is present.
    """

    depth: int
    width: int
    num_heads: int
    patch: int = 2
    channels: int = 16
    mlp_ratio: int = 4
    qk_norm: bool = True
    dual_blocks: int = 0
    weight_sets: int = 2
    text_split: int = 77
    pos_size: int = 192  # of SD3-medium; SD3.5-medium has 384
    pos_base: int = 64  # tokens that span the units of a 256-pixel image
    dtype: DTypeLike = jnp.bfloat16
    remat: str = "full"
    unroll: int = 1  # blocks an iteration of the scan; on a CPU a loop costs: use depth
    attention: str = "auto"

    @nn.compact
    def __call__(
        self,
        xt: Float[Array, "b h w c"],
        t: Float[Array, " b"],
        context: Float[Array, "b l k"],
        pooled: Float[Array, "b e"],
        *,
        residuals: Float[Array, "r b n d"] | None = None,
        residual_last: bool = False,
        skip: Sequence[int] = (),
        place: Int[Array, "b 2"] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The velocity (b, h, w, c) at (xt, t), in float32.

        Block i adds ControlNet residual int(i / (depth / r)) of r. Blocks in `skip` are
        the identity (skip-layer guidance). `place` is the top left of each image on the
        position table, in tokens; by default images lie at its centre.
        """
        # --- embed the image, the text, and time with the pooled text
        x = image_tokens(self, xt, place)  # (b, n, d)
        text = text_tokens(self, context)
        c = condition(t, pooled, self.width, self.dtype)

        # --- joint blocks: those with dual attention, the others, the last one
        split = () if self.weight_sets == 2 else (self.text_split,)
        streams = (x, *jnp.split(text, split, axis=1))
        last, dual = self.depth - 1, self.dual_blocks
        for name, layers in ("dual_blocks", range(dual)), ("blocks", range(dual, last)):
            blocks = self.stack(layers, name, skip, dual=name == "dual_blocks")
            streams = blocks(streams, c, residuals)
        # The last block has fewer weights (its text stream ends), so it is no layer of
        # the scan.
        block = self.block(pre_only=True, name="last_block")
        x = streams[0] if last in skip else block(streams, block.modulations(c))[0]
        # diffusers adds no residual after the last block, the released code does.
        if residual_last and residuals is not None:
            x = x + residuals[-1].astype(x.dtype)

        # --- final layer
        return velocity(self, x, c, *xt.shape[1:3])

    def random_place(
        self, key: Key[Array, ""], shape: Sequence[int]
    ) -> Int[Array, "b 2"]:
        """Uniform places (b, 2) where latents (b, h, w, c) fit on the table."""
        b, h, w, _ = shape
        last = self.pos_size - jnp.array([h, w]) // self.patch
        return jax.random.randint(key, (b, 2), 0, last + 1)

    def block(self, **kwargs):
        return Block(
            self.width,
            self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_norm,
            dtype=self.dtype,
            attention=self.attention,
            weight_sets=self.weight_sets,
            **kwargs,
        )

    def stack(self, layers: range, name: str, skip: Sequence[int], **kwargs):
        """Blocks in one scan: program size does not grow with depth.

        Returns run(streams, c, residuals) -> streams.
        """
        if not layers:
            return lambda streams, c, residuals: streams

        def body(block, streams, layer, residuals):
            # None where no layer is skipped, and no ControlNet is there: the program
            # then has neither a branch nor an addition.
            keep, source, modulations = layer
            if keep is None:
                streams = block(streams, modulations)
            else:
                run = lambda block, streams: block(streams, modulations)
                streams = nn.cond(keep, run, lambda _, s: s, block, streams)
            if source is not None:
                x, *texts = streams
                streams = (x + residuals[source].astype(x.dtype), *texts)
            return streams, None

        scan = scanned(
            body,
            len(layers),
            remat=self.remat,
            unroll=self.unroll,
            in_axes=(0, nn.broadcast),
        )
        # adaLN reads c alone: one product for all layers before the scan, instead of a
        # small one with its own collectives in every layer.
        modulations = stacked(lambda block, c: block.modulations(c), len(layers))
        block = self.block(**kwargs, name=name)
        keep = jnp.array([i not in skip for i in layers]) if skip else None

        def run(streams, c, residuals):
            source = None
            if residuals is not None:
                # A float, as in diffusers: 16 residuals for 38 blocks.
                span = self.depth / len(residuals)
                source = jnp.array([int(i / span) for i in layers])
            inputs = keep, source, modulations(block, c)
            return scan(block, streams, inputs, residuals)[0]

        return run


class Block(nn.Module):
    """One joint block: modulate each stream, attend over all, add, then the MLPs."""

    width: int
    num_heads: int
    mlp_ratio: int = 4
    qk_norm: bool = True
    dual: bool = False
    pre_only: bool = False  # the last block: text gives keys and values, then ends
    weight_sets: int = 2
    dtype: DTypeLike = jnp.bfloat16
    attention: str = "auto"

    def setup(self):
        for i, name in enumerate(("image", "text", "text2")[: self.weight_sets]):
            setattr(self, name, self.stream(first=i == 0))

    @property
    def streams(self) -> Sequence["Stream"]:
        sets = ("image", "text", "text2")[: self.weight_sets]
        return [getattr(self, name) for name in sets]

    def modulations(self, c: Float[Array, "b d"]) -> Sequence[Float[Array, "b _ d"]]:
        """adaLN outputs (b, chunks, d) of each stream for the condition c."""
        return tuple(stream.adaln(c) for stream in self.streams)

    def __call__(
        self,
        xs: Sequence[Float[Array, "b _ d"]],
        modulations: Sequence[Float[Array, "b _ d"]],
    ) -> tuple[Float[Array, "b _ d"], ...]:
        streams = self.streams
        opened = [s.open(x, m) for s, x, m in zip(streams, xs, modulations)]
        # Streams that end here have keys and values, but no query is needed.
        going = [i for i, stream in enumerate(streams) if not stream.pre_only]
        qs = [opened[i].q for i in going]
        ks, vs = [whole(o.k) for o in opened], [whole(o.v) for o in opened]
        if mesh_context.parts("tokens") == [1]:
            parts = joint_attention(qs, ks, vs, kernel=self.attention)
        else:  # tokens are sharded: joined queries would take two all-to-alls a block
            attend = lambda q: joint_attention([q], ks, vs, kernel=self.attention)[0]
            parts = [attend(q) for q in qs]
        return tuple(
            streams[i].close(xs[i], part, opened[i]) for i, part in zip(going, parts)
        )

    def stream(self, first: bool) -> "Stream":
        return Stream(
            self.width,
            self.num_heads,
            mlp_ratio=self.mlp_ratio,
            qk_norm=self.qk_norm,
            dual=self.dual and first,
            pre_only=self.pre_only and not first,
            dtype=self.dtype,
            attention=self.attention,
        )


class Opened(NamedTuple):
    """A stream before the joint attention: its q, k, v, and what `close` needs."""

    q: Array
    k: Array
    v: Array
    modulation: Sequence[Array]  # chunks of (b, d)
    dual: Array | None  # gated output of the attention among image tokens


class Stream(nn.Module):
    """One modality's weights in a block.

    The adaLN chunks are in the released order: shift, scale and gate of attention, then
    of the MLP, then of the dual attention.
    """

    width: int
    num_heads: int
    mlp_ratio: int
    qk_norm: bool
    dual: bool
    pre_only: bool
    dtype: DTypeLike
    attention: str

    def setup(self):
        # Shift and scale of attention; its gate and the MLP's three make 6, attn2's 9.
        chunks = 2 if self.pre_only else 9 if self.dual else 6
        self.adaln = Modulation(chunks, self.width, dtype=self.dtype)
        self.attn = Projections(**self.projections(out=not self.pre_only))
        if self.dual:
            self.attn2 = Projections(**self.projections(out=True))
        if not self.pre_only:
            self.mlp = Mlp(self.mlp_ratio, dtype=self.dtype)

    def projections(self, out: bool) -> dict:
        return dict(
            width=self.width,
            num_heads=self.num_heads,
            qk_norm=self.qk_norm,
            out=out,
            dtype=self.dtype,
        )

    def open(self, x: Array, modulation: Array) -> Opened:
        modulation = jnp.unstack(modulation, axis=1)  # of (b, chunks, d)
        normed = layer_norm(x)
        q, k, v = self.attn.qkv(modulate(normed, *modulation[:2]))
        dual = None
        # MMDiT-X: both attentions read the same normed x, so both outputs are added
        # to the x of before the block.
        if self.dual:
            shift, scale, gate = modulation[6:]
            q2, k2, v2 = self.attn2.qkv(modulate(normed, shift, scale))
            h = attention(q2, whole(k2), whole(v2), kernel=self.attention)
            dual = gate[:, None] * self.attn2.project(h)
        return Opened(q, k, v, modulation, dual)

    def close(self, x: Array, joint: Array, opened: Opened) -> Array:
        gate_attn, shift, scale, gate_mlp = opened.modulation[2:6]
        x = cut(x + gate_attn[:, None] * self.attn.project(joint))
        if opened.dual is not None:
            x = x + opened.dual
        h = self.mlp(modulate(layer_norm(x), shift, scale))
        return cut(x + gate_mlp[:, None] * checkpoint_name(h, "fed"))


class Projections(nn.Module):
    """Linear maps to q, k and v and out of attention; qk-norm keeps logits bounded.

    q and k are RMS-normed by head where `qk_norm` (paper, sec. 5.3.2).
    """

    width: int
    num_heads: int
    qk_norm: bool
    out: bool = True
    dtype: DTypeLike = jnp.bfloat16

    def setup(self):
        size = self.width // self.num_heads
        heads = (3, self.num_heads, size)
        axes = ("embed", None, "heads", None)
        self.to_qkv = Dense(heads, axes, dtype=self.dtype)
        if self.qk_norm:
            self.norm_q = RmsNorm()
            self.norm_k = RmsNorm()
        if self.out:
            axes = ("heads", None, "embed")
            self.to_out = Dense(self.width, axes, dtype=self.dtype)

    def qkv(self, x: Float[Array, "b n d"]) -> Sequence[Float[Array, "b n a k"]]:
        qkv = self.to_qkv(x)  # (b, n, 3, a, k)
        axes = ("batch", "tokens", None, "heads", None)
        qkv = nn.with_logical_constraint(qkv, axes)
        # Saved before the norms: the backward pass then redoes cheap norms only.
        q, k, v = (saved(x) for x in jnp.unstack(qkv, axis=-3))
        return (self.norm_q(q), self.norm_k(k), v) if self.qk_norm else (q, k, v)

    def project(self, x: Float[Array, "b n a k"]) -> Float[Array, "b n d"]:
        return checkpoint_name(self.to_out(x), "projected")


def saved(x: Float[Array, "b n a k"]) -> Float[Array, "b n a k"]:
    """q, k or v (b, n, a, k) under the name by which remat keeps it."""
    # Flat: a TPU pads heads of 64 to 128 lanes, twice the memory. Not all three in one
    # array: XLA would copy it to take them apart.
    return checkpoint_name(x.reshape(*x.shape[:2], -1), "qkv").reshape(x.shape)
