"""MMDiT: separate weights for image and text, one joint attention (paper, sec. 4)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from sd3_jax.models import flops, step_cache
from sd3_jax.models.attention.attention import shares
from sd3_jax.models.attention.self_only import self_only_attention
from sd3_jax.models.denoiser import TokenDenoiser
from sd3_jax.models.denoiser_blocks import DenoiserBlock, Projections, block_options
from sd3_jax.models.layers import Mlp, Modulation, cut, layer_norm, modulate, whole
from sd3_jax.models.scan import OBSERVED, stacked

# What a skipped layer leaves out: all of it (skip-layer guidance), or the attention
# among image tokens (PAG).
SKIPPED = ("block", "attention")


class MMDiT(TokenDenoiser):
    """The SD3 denoiser (paper, sec. 4): (xt, t, context, pooled) to a velocity.

    The first `dual_blocks` blocks add self-attention among image tokens (MMDiT-X of
    SD3.5-medium). With `weight_sets=3`, text tokens from `text_split` on, T5's, have
    weights of their own (sec. 5.2.3).
    """

    dual_blocks: int = 0
    weight_sets: int = 2
    text_split: int = 77

    def velocity(
        self,
        xt: Array,
        t: Array,
        context: Array,
        pooled: Array,
        *,
        residuals: Float[Array, "r b n d"] | None = None,
        residual_last: bool = False,
        skip: Sequence[int] = (),
        skipped: str = "block",
        place: Int[Array, "b 2"] | None = None,
        cache: step_cache.Cache | None = None,
    ) -> Float[Array, "b h w c"]:
        """The velocity, with what ControlNets and guidance change in it.

        Block i adds ControlNet residual int(i / (depth / r)) of r; the last block adds
        one only with `residual_last`. Blocks in `skip` leave out `skipped`, one of
        SKIPPED. `place` is the top left of each image on the position table, in tokens;
        by default images lie at its centre. With a `cache` some steps run no blocks.
        """
        # --- embed the image, the text, and time with the pooled text
        x = self.image_tokens(xt, place)  # (b, n, d)
        text = self.text_tokens(context)
        c = self.condition(t, pooled)

        # --- joint blocks: those with dual attention, the others, the last one
        split = () if self.weight_sets == 2 else (self.text_split,)
        streams = (x, *jnp.split(text, split, axis=1))
        last, dual = self.depth - 1, self.dual_blocks
        stacks = ("dual_blocks", range(dual)), ("blocks", range(dual, last))

        def blocks(module, streams, skip=skip):
            for name, layers in stacks:
                options = dict(dual=name == "dual_blocks")
                run = module.stack(layers, name, skip, skipped, **options)
                streams = run(streams, c, residuals)
            # The last block has fewer weights (its text stream ends), so it is no layer
            # of the scan.
            block = module.joint_block("last_block", pre_only=True)
            left_out = skipped if last in skip else ""
            x = block(streams, block.modulations(c), skipped=left_out)[0]
            # diffusers adds no residual after the last block, the released code does.
            if residual_last and residuals is not None:
                x = x + residuals[-1].astype(x.dtype)
            return x

        x = step_cache.around(self, cache, streams, c, blocks)

        # --- final layer
        return self.final_layer(x, c, *xt.shape[1:3])

    def flops(self, *, height: int, width: int, text: int, text_dim: int) -> float:
        d, n = self.width, flops.tokens(self, height, width)
        token = 2 * (4 + 2 * self.mlp_ratio) * d**2  # qkv, out and the two of the MLP
        image = self.depth * token * n
        # The last block's text stream has qkv only.
        words = ((self.depth - 1) * token + 2 * 3 * d**2) * text
        # q k^T and weights v: 2 d a pair of tokens each. The last block has image
        # queries alone.
        joint = 4 * d * ((self.depth - 1) * (n + text) ** 2 + n * (n + text))
        # qkv and out, attention among n tokens, and three more chunks of adaLN.
        dual = self.dual_blocks * (8 * d**2 * n + 4 * d * n**2 + 6 * d**2)
        # adaLN has 6 chunks a stream (2 of the last block's text streams), the final
        # one 2; the rest is the embedders of time (256 -> d -> d) and of the pooled
        # text, its second layer.
        chunks = 6 * self.weight_sets * self.depth - 4 * (self.weight_sets - 1)
        vectors = 2 * d**2 * (chunks + 2 + 2) + 2 * 256 * d
        return float(
            image + words + joint + dual + vectors + flops.ends(self, n, text, text_dim)
        )

    def joint_block(self, name: str, **options) -> "Block":
        sizes = dict(width=self.width, weight_sets=self.weight_sets)
        return self.block(Block, name, **sizes, **options)

    def stack(
        self, layers: range, name: str, skip: Sequence[int], skipped: str, **options
    ):
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
                run = lambda block, s: block(s, modulations)
                change = lambda block, s: block(s, modulations, skipped=skipped)
                streams = nn.cond(keep, run, change, block, streams)
            if source is not None:
                x, *texts = streams
                streams = (x + residuals[source].astype(x.dtype), *texts)
            return streams, None

        scan = self.scanned(body, len(layers), in_axes=(0, nn.broadcast))
        # adaLN reads c alone: one product for all layers before the scan, instead of a
        # small one with its own collectives in every layer.
        modulations = stacked(lambda block, c: block.modulations(c), len(layers))
        block = self.joint_block(name, **options)
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


class Block(DenoiserBlock, kw_only=True):
    """One joint block: modulate each stream, attend over all, add, then the MLPs."""

    width: int
    dual: bool = False
    pre_only: bool = False  # the last block: text gives keys and values, then ends
    weight_sets: int = 2

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
        *,
        skipped: str = "",
    ) -> tuple[Float[Array, "b _ d"], ...]:
        """The streams after the block; `skipped` is "" or one of SKIPPED."""
        if skipped == "block":
            return tuple(xs)
        streams, to_itself = self.streams, bool(skipped)
        opened = [s.open(x, m, to_itself) for s, x, m in zip(streams, xs, modulations)]
        # Streams that end here have keys and values, but no query is needed.
        going = [i for i, stream in enumerate(streams) if not stream.pre_only]
        parts = self.joint(opened, len(going), skipped)
        outputs = tuple(
            streams[i].close(xs[i], part, opened[i]) for i, part in zip(going, parts)
        )
        # Mutable only in sampling/observation.py: other programs do without the maps.
        if self.is_mutable_collection(OBSERVED) and not self.is_initializing():
            self.observe(opened[0].q, [o.k for o in opened], outputs)
        return outputs

    def observe(self, q: Array, ks: Sequence[Array], outputs: Sequence[Array]) -> None:
        """Keeps the image's attention to the text, (b, n, l), and the RMS of each
        output, (b, streams), in the collection OBSERVED."""
        attention_to_text = shares(q, jnp.concatenate(ks, axis=1))[..., q.shape[1] :]
        self.sow(OBSERVED, "attention", attention_to_text)
        square = lambda x: jnp.square(x.astype(jnp.float32))
        rms = [jnp.sqrt(jnp.mean(square(x), axis=(1, 2))) for x in outputs]
        self.sow(OBSERVED, "rms", jnp.stack(rms, axis=-1))

    def joint(
        self, opened: Sequence["Opened"], count: int, skipped: str
    ) -> Sequence[Array]:
        """The joint attention's output (b, _, a, k) for the first `count` streams."""
        qs = [stream.q for stream in opened[:count]]
        ks, vs = [o.k for o in opened], [o.v for o in opened]
        if skipped != "attention":
            return self.attend(qs, ks, vs)
        # k and v of an image token lie where its q does: they are not gathered.
        texts = [whole(k) for k in ks[1:]], [whole(v) for v in vs[1:]]
        h = self_only_attention(qs[0], ks[0], vs[0], *texts)
        # Each text by itself: joined, they would be another program than without PAG.
        return [h, *(self.attend([q], ks, vs)[0] for q in qs[1:])]

    def stream(self, first: bool) -> "Stream":
        return Stream(
            width=self.width,
            dual=self.dual and first,
            pre_only=self.pre_only and not first,
            **block_options(self),
        )


class Opened(NamedTuple):
    """A stream before the joint attention: its q, k, v, and what `close` needs."""

    q: Array
    k: Array
    v: Array
    modulation: Sequence[Array]  # chunks of (b, d)
    dual: Array | None  # gated output of the attention among image tokens


class Stream(DenoiserBlock, kw_only=True):
    """One modality's weights in a block.

    The adaLN chunks are in the released order: shift, scale and gate of attention, then
    of the MLP, then of the dual attention.
    """

    width: int
    dual: bool
    pre_only: bool

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

    def open(self, x: Array, modulation: Array, to_itself: bool) -> Opened:
        modulation = jnp.unstack(modulation, axis=1)  # of (b, chunks, d)
        normed = layer_norm(x)
        q, k, v = self.attn.qkv(modulate(normed, *modulation[:2]))
        dual = None
        # MMDiT-X: both attentions read the same normed x, so both outputs are added
        # to the x of before the block.
        if self.dual:
            shift, scale, gate = modulation[6:]
            q2, k2, v2 = self.attn2.qkv(modulate(normed, shift, scale))
            h = v2
            if not to_itself:
                (h,) = self.attend([q2], [k2], [v2])
            dual = gate[:, None] * self.attn2.project(h)
        return Opened(q, k, v, modulation, dual)

    def close(self, x: Array, joint: Array, opened: Opened) -> Array:
        gate_attn, shift, scale, gate_mlp = opened.modulation[2:6]
        x = cut(x + gate_attn[:, None] * self.attn.project(joint))
        if opened.dual is not None:
            x = x + opened.dual
        h = self.mlp(modulate(layer_norm(x), shift, scale))
        return cut(x + gate_mlp[:, None] * checkpoint_name(h, "fed"))
