"""The text encoders' names: transformers' own, in both layouts."""

import numpy as np

from sd3_jax.models.clip import ClipText
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.weights.key_mapping import AS_IS, MERGING, Group, Row

# Ends of names that files may hold and no model reads.
IGNORED = ("encoder.embed_tokens.weight", "position_ids", "logit_scale")
PROJECTION = "text_projection.weight"  # of CLIP-L, in an original file: not read either
CLIP_BLOCK = (  # of either tower
    Row("norm1", "layer_norm1"),
    Row("to_qkv", tuple(f"self_attn.{name}_proj" for name in "qkv")),
    Row("to_out", "self_attn.out_proj", kind=MERGING),
    Row("norm2", "layer_norm2"),
    Row("fc1", "mlp.fc1"),
    Row("fc2", "mlp.fc2"),
)


def clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """`projected`: whether the original layout has a text projection; CLIP-L's has not,
    and its pooled vector is taken as it is."""
    projection = Row("text_projection", "text_projection")
    if not projected:
        projection = projection._replace(original=None, fill=lambda s: np.eye(*s))
    ends = (
        Row("tokens", "text_model.embeddings.token_embedding.weight", kind=AS_IS),
        Row("positions", "text_model.embeddings.position_embedding.weight", kind=AS_IS),
        Row("final_norm", "text_model.final_layer_norm"),
        projection,
    )
    files = ("text_model.encoder.layers.{}",) * 2
    blocks = Group("blocks", *files, CLIP_BLOCK, range(model.depth))
    return [Group("", "", "", ends), blocks]


def clip_l_table(model: ClipText) -> list[Group]:
    return clip_table(model, projected=False)


OPEN_CLIP_BLOCK = (
    Row("norm1", None, "ln_1"),
    Row("to_qkv", None, "attn.in_proj_"),
    Row("to_out", None, "attn.out_proj", kind=MERGING),
    Row("norm2", None, "ln_2"),
    Row("fc1", None, "mlp.c_fc"),
    Row("fc2", None, "mlp.c_proj"),
)


def open_clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """OpenCLIP's names of the same tower, and OpenAI's: q, k and v in one matrix, and
    a projection that is (in, out), as ours."""
    projection = Row("text_projection/kernel", None, "text_projection", AS_IS)
    if not projected:
        projection = projection._replace(original=None, fill=lambda s: np.eye(*s))
    ends = (
        Row("tokens", None, "token_embedding.weight", kind=AS_IS),
        Row("positions", None, "positional_embedding", kind=AS_IS),
        Row("final_norm", None, "ln_final"),
        projection,
    )
    files = ("", "transformer.resblocks.{}")
    blocks = Group("blocks", *files, OPEN_CLIP_BLOCK, range(model.depth))
    return [Group("", "", "", ends), blocks]


def open_clip_l_table(model: ClipText) -> list[Group]:
    return open_clip_table(model, projected=False)


def t5_table(model: T5Encoder) -> list[Group]:
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ends = (
        Row("embedding", "shared.weight", kind=AS_IS),
        Row("stack/relative_bias", bias, kind=AS_IS),
        Row("stack/norm", "encoder.final_layer_norm"),
    )
    attn, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    block = (
        Row("norm_attn", "layer.0.layer_norm"),
        Row("to_qkv", tuple(f"{attn}.{name}" for name in "qkv")),
        Row("to_out", f"{attn}.o", kind=MERGING),
        Row("norm_mlp", "layer.1.layer_norm"),
        Row("wi", (f"{mlp}.wi_0", f"{mlp}.wi_1")),
        Row("wo", f"{mlp}.wo"),
    )
    files = ("encoder.block.{}",) * 2
    stack = Group("stack/blocks", *files, block, range(model.depth))
    return [Group("", "", "", ends), stack]
