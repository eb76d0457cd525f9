"""Infer a model's configuration from names and shapes of a file's tensors.

A single file has no other configuration. Where there is one, it must agree with the
tensors (published_configs.agree).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sd3_jax.errors import UserError

Shapes = Mapping[str, Any]  # tensors by name, of which only .shape is read
# Products of fields, which a shape tells where it does not tell the factors.
INNER = "num_attention_heads x attention_head_dim"
HINT = "in_channels + extra_conditioning_channels"
T5_INNER = "num_heads x d_kv"
HEAD = 64  # size of a head in every published file without a configuration


class Size(NamedTuple):
    """A field that tell(shape) gives from the shape of a tensor with `axes` axes."""

    field: str
    tensor: str
    axes: int
    tell: Callable[[Sequence[int]], int | None]
    optional: bool = False


def axis(field: str, tensor: str, axes: int, at: int, **options) -> Size:
    """A field that is the size of axis `at`."""
    return Size(field, tensor, axes, lambda shape: shape[at], **options)


def patches(tensor: str, channels: str = "in_channels") -> tuple[Size, ...]:
    """Fields from a patch embedding (width, channels, patch, patch)."""
    fields = INNER, channels, "patch_size"
    return tuple(axis(field, tensor, 4, at) for at, field in enumerate(fields))


def positions(tensor: str, **options) -> Size:
    """The field of a position table (1, side^2, width)."""
    return Size("pos_embed_max_size", tensor, 3, lambda s: _root(s[1]), **options)


def _root(n: int) -> int | None:
    """The square root of a square number, else None."""
    return math.isqrt(n) if math.isqrt(n) ** 2 == n else None


# linear_1 reads the pooled text, so its inputs are that wide.
DIFFUSERS_POOLED = "time_text_embed.text_embedder.linear_1.weight"
CONTEXT = axis("joint_attention_dim", "context_embedder.weight", 2, 1)
DENOISER = (
    *patches("pos_embed.proj.weight"),
    positions("pos_embed.pos_embed"),
    axis("pooled_projection_dim", DIFFUSERS_POOLED, 2, 1),
    CONTEXT,
)
ORIGINAL_DENOISER = (
    *patches("x_embedder.proj.weight"),
    positions("pos_embed"),
    axis("pooled_projection_dim", "y_embedder.mlp.0.weight", 2, 1),
    CONTEXT,
)
CONTROLNET = (  # diffusers' names outside the blocks, in both layouts
    *patches("pos_embed_input.proj.weight", channels=HINT),
    positions("pos_embed.pos_embed", optional=True),
    axis("pooled_projection_dim", DIFFUSERS_POOLED, 2, 1),
    CONTEXT._replace(optional=True),
)
# The decoder's: the encoder ends in twice as many, mean and log-variance.
VAE = (axis("latent_channels", "decoder.conv_in.weight", 4, 1),)
TAESD = (axis("latent_channels", "decoder.layers.0.weight", 4, 1),)
ORIGINAL_TAESD = (axis("latent_channels", "decoder.1.weight", 4, 1),)
EMBEDDINGS = "text_model.embeddings"
CLIP_TEXT = (
    axis("vocab_size", f"{EMBEDDINGS}.token_embedding.weight", 2, 0),
    axis("hidden_size", f"{EMBEDDINGS}.token_embedding.weight", 2, 1),
    axis("max_position_embeddings", f"{EMBEDDINGS}.position_embedding.weight", 2, 0),
    axis("intermediate_size", "text_model.encoder.layers.0.mlp.fc1.weight", 2, 0),
    # A single file lacks CLIP-L's projection: the vector is as wide as the tower.
    axis("projection_dim", "text_projection.weight", 2, 0, optional=True),
)
PATCHES = "vision_model.embeddings.patch_embedding.weight"
PLACES = "vision_model.embeddings.position_embedding.weight"
CLIP_VISION = (
    axis("hidden_size", PATCHES, 4, 0),
    axis("num_channels", PATCHES, 4, 1),
    axis("patch_size", PATCHES, 4, 2),
    axis("intermediate_size", "vision_model.encoder.layers.0.mlp.fc1.weight", 2, 0),
    axis("projection_dim", "visual_projection.weight", 2, 0),
)
BLOCK = "encoder.block.0.layer"
BIAS = f"{BLOCK}.0.SelfAttention.relative_attention_bias.weight"
T5 = (
    axis("vocab_size", "shared.weight", 2, 0),
    axis("d_model", "shared.weight", 2, 1),
    axis("relative_attention_num_buckets", BIAS, 2, 0),  # (buckets, heads)
    axis("num_heads", BIAS, 2, 1),
    axis(T5_INNER, f"{BLOCK}.0.SelfAttention.q.weight", 2, 0),
    axis("d_ff", f"{BLOCK}.1.DenseReluDense.wi_0.weight", 2, 0),
)
SIZES = {
    "denoiser": DENOISER,
    "controlnet": CONTROLNET,
    "vae": VAE,
    "taesd": TAESD,
    "clip_l": CLIP_TEXT,
    "clip_g": CLIP_TEXT,
    "t5": T5,
    "clip_text": CLIP_TEXT,
    "clip_vision": CLIP_VISION,
}
# Of components whose names differ by layout where they tell a size.
ORIGINAL_SIZES = {"denoiser": ORIGINAL_DENOISER, "taesd": ORIGINAL_TAESD}
CLIP_LAYERS = "num_hidden_layers", "text_model.encoder.layers."
LAYERS = {  # the field, and the prefix of its layers' names
    "denoiser": ("num_layers", "transformer_blocks."),
    "controlnet": ("num_layers", "controlnet_blocks."),
    "clip_l": CLIP_LAYERS,
    "clip_g": CLIP_LAYERS,
    "clip_text": CLIP_LAYERS,
    "clip_vision": ("num_hidden_layers", "vision_model.encoder.layers."),
    "t5": ("num_layers", "encoder.block."),
}
# The autoencoder's levels have names by layout too: see _levels.
ORIGINAL_LAYERS = LAYERS | {"denoiser": ("num_layers", "joint_blocks.")}
NORMS = ".norm_q.", ".ln_q."  # qk-norm in diffusers' and in the original layout
Measured = dict[str, tuple[Any, str]]  # by field: value, and reason for a message


def sizes_of(kind: str, layout: str) -> tuple[Size, ...]:
    """The fields that tensors of a file tell."""
    return (
        ORIGINAL_SIZES.get(kind, SIZES[kind]) if layout == "original" else SIZES[kind]
    )


def measured(kind: str, x: Shapes, layout: str, where: str) -> Measured:
    """Every field that the tensors tell. A missing tensor tells nothing."""
    fields: Measured = {}
    for size in sizes_of(kind, layout):
        if size.tensor in x:
            fields[size.field] = _tell(size, x[size.tensor].shape, where)
    if kind in LAYERS:
        field, prefix = (ORIGINAL_LAYERS if layout == "original" else LAYERS)[kind]
        depth = number_of_layers(x, prefix, where)
        fields[field] = depth, f"the file has {prefix}0 to {depth - 1}"
    if kind in ("denoiser", "controlnet"):
        fields |= _blocks(x)
    return fields | _levels(x, layout, where) if kind == "vae" else fields


def _tell(size: Size, shape: Sequence[int], where: str) -> tuple[int, str]:
    reason = f"{size.tensor} is {list(shape)}"
    if len(shape) != size.axes:
        raise UserError(f"{where}: {reason}: expected {size.axes} axes")
    value = size.tell(shape)
    if value is None:
        raise UserError(f"{where}: {reason}, which is not a valid {size.field}")
    return value, reason


def _blocks(x: Shapes) -> Measured:
    # Both optional parts are known by the names of their tensors.
    dual = sorted({int(m[1]) for k in x if (m := re.match(DUAL, k))})
    normed = next((k for k in x if any(norm in k for norm in NORMS)), None)
    reason = f"{normed} is there" if normed else "no layer has a norm of q"
    return {
        "dual_attention_layers": (dual, "of these layers there are attn2's tensors"),
        "qk_norm": ("rms_norm" if normed else None, reason),
    }


DUAL = r"(?:transformer|joint)_blocks\.([0-9]{1,9})\.(?:x_block\.)?attn2\."


def _levels(x: Shapes, layout: str, where: str) -> Measured:
    """Widths, resnets and attention of the autoencoder, from its encoder."""
    one, block, middle = {
        "diffusers": ("encoder.down_blocks.", "resnets", "encoder.mid_block.attent"),
        "original": ("encoder.down.", "block", "encoder.mid.attn_1."),
    }[layout]
    levels = number_of_layers(x, one, where)
    names = [f"{one}{i}.{block}.0.conv1.weight" for i in range(levels)]
    fields: Measured = {}
    if all(name in x for name in names):
        first = [axis("block_out_channels", name, 4, 0) for name in names]
        widths = [_tell(size, x[size.tensor].shape, where)[0] for size in first]
        fields["block_out_channels"] = (
            widths,
            f"{names[0]} and similar tensors have these widths",
        )
    resnets = number_of_layers(x, f"{one}0.{block}.", where)
    fields["layers_per_block"] = resnets, f"{one}0 has this many"
    attends = any(name.startswith(middle) for name in x)
    reason = f"{middle}… is {'there' if attends else 'missing'}"
    return fields | {"mid_block_add_attention": (attends, reason)}


def number_of_layers(x: Shapes, prefix: str, where: str) -> int:
    """Number of layers below a prefix; UserError if one is missing among them."""
    # Counted, not the largest number plus one: a forged name must not become a model of
    # 10^9 layers.
    number = re.compile(re.escape(prefix) + r"([0-9]{1,9})\.")
    layers = sorted({int(m[1]) for k in x if (m := number.match(k))})
    missing = next((i for i, n in enumerate(layers) if i != n), None)
    if not layers:
        raise UserError(f"{where}: {prefix}0 is missing")
    if missing is not None:
        raise UserError(
            f"{where}: {prefix}{missing} is missing, but {prefix}{layers[-1]} exists"
        )
    return len(layers)


def is_tiny(x: Shapes) -> bool:
    """Whether an autoencoder's tensors are those of a TAESD."""
    return any(size.tensor in x for size in TAESD + ORIGINAL_TAESD)


# --- configurations of single files


def detect(kind: str, x: Shapes, where: str = "", *, layout: str = "original") -> dict:
    """The configuration in diffusers' or transformers' fields, for published_configs.

    Fields that no tensor tells are as in the published files; those whose default is
    that already are left to published_configs. Raises UserError if a tensor is missing
    or of another number of axes.
    """
    where = where or kind
    for size in sizes_of(kind, layout):
        if size.tensor not in x and not size.optional:
            raise UserError(f"{where}: {size.tensor} is missing")
    sizes = {k: value for k, (value, _) in measured(kind, x, layout, where).items()}
    return PUBLISHED[kind](x, sizes, where)


def _heads(width: int, where: str) -> int:
    # The number of heads is in no shape.
    if not width or width % HEAD:
        raise UserError(
            f"{where}: {width} wide, but a file without a configuration has heads of"
            f" {HEAD}; use a folder with its config.json"
        )
    return width // HEAD


def _denoiser(x: Shapes, sizes: dict, where: str) -> dict:
    width = sizes.pop(INNER)
    return sizes | {
        "attention_head_dim": HEAD,
        "num_attention_heads": _heads(width, where),
        "caption_projection_dim": width,
        "out_channels": sizes["in_channels"],
    }


def _controlnet(x: Shapes, sizes: dict, where: str) -> dict:
    # The hint's channels are the latent's 16 and extra ones, such as a mask.
    width, hint, channels = sizes.pop(INNER), sizes.pop(HINT), 16
    # A file without text embedding is a single stream, one without table borrows it.
    joint, table = "joint_attention_dim" in sizes, "pos_embed_max_size" in sizes
    return (
        {"joint_attention_dim": None, "pos_embed_max_size": None}
        | sizes
        | {
            "in_channels": channels,
            "extra_conditioning_channels": hint - channels,
            "attention_head_dim": HEAD,
            "num_attention_heads": _heads(width, where),
            "caption_projection_dim": width if joint else 2048,
            "out_channels": channels,
            "pos_embed_type": "sincos" if table else None,
            "use_pos_embed": table,
            "force_zeros_for_pooled_projection": joint,
        }
    )


def _vae(x: Shapes, sizes: dict, where: str) -> dict:
    if "block_out_channels" not in sizes:
        raise UserError(
            f"{where}: encoder.down.0.block.0.conv1.weight, or its equivalent in"
            " another level, is missing"
        )
    levels = len(sizes["block_out_channels"])
    return sizes | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "sample_size": 1024,
        "scaling_factor": 1.5305,  # SD3's; no tensor tells it
        "shift_factor": 0.0609,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in x,  # refused: SD3 has none
        "use_post_quant_conv": "post_quant_conv.weight" in x,
    }


def _taesd(x: Shapes, sizes: dict, where: str) -> dict:
    # All published ones have the same blocks; loading lists what differs.
    return sizes | {"_class_name": "AutoencoderTiny"}


def _clip(activation: str, x: Shapes, sizes: dict, where: str) -> dict:
    width = sizes["hidden_size"]
    return (
        {"projection_dim": width}
        | sizes
        | {
            "architectures": ["CLIPTextModelWithProjection"],
            "num_attention_heads": _heads(width, where),
            "hidden_act": activation,
            "bos_token_id": 0,
            "eos_token_id": 2,  # as published: see clip.LEGACY_EOS
            "pad_token_id": 1,
        }
    )


# Widths of OpenAI's ViT-B and ViT-L, which have quick_gelu and heads of 64. Others may
# have another activation, which no tensor tells.
OPENAI = (768, 1024)


def _vision(x: Shapes, sizes: dict, where: str) -> dict:
    width = sizes["hidden_size"]
    if width not in OPENAI:
        raise UserError(
            f"{where}: a vision tower of width {width}, but a single file must be"
            " OpenAI's ViT-B or ViT-L; use a folder with its config.json"
        )
    if PLACES not in x:
        raise UserError(f"{where}: {PLACES} is missing")
    # (side^2 + 1, width): one more position, for the class token.
    side = Size("image_size", PLACES, 2, lambda s: _root(s[0] - 1))
    places, _ = _tell(side, x[side.tensor].shape, where)
    return sizes | {
        "num_attention_heads": _heads(width, where),
        "image_size": sizes["patch_size"] * places,
    }


def _t5(x: Shapes, sizes: dict, where: str) -> dict:
    inner, heads = sizes.pop(T5_INNER), sizes["num_heads"]
    if not heads or inner % heads:
        raise UserError(
            f"{where}: inner width {inner} for {heads} heads, which do not divide it"
        )
    return sizes | {
        "architectures": ["T5EncoderModel"],
        "d_kv": inner // heads,  # both from shapes: the relative bias has the heads
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


PUBLISHED = {
    "denoiser": _denoiser,
    "controlnet": _controlnet,
    "vae": _vae,
    "taesd": _taesd,
    "clip_l": lambda *args: _clip("quick_gelu", *args),
    "clip_g": lambda *args: _clip("gelu", *args),
    "clip_text": lambda *args: _clip("quick_gelu", *args),
    "clip_vision": _vision,
    "t5": _t5,
}
