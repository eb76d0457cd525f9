"""Key tables of the text encoders, in transformers' and OpenCLIP's names."""

import numpy as np

from sd3_jax.models.clip import ClipText
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.weights.key_mapping import AS_IS, LINEAR, MERGING, Group, Row

# Two names of T5's embedding, which transformers ties.
SHARED, EMBED_TOKENS = "shared.weight", "encoder.embed_tokens.weight"
# Ends of names that files may hold and no model reads: T5's embedding once more, the
# numbers 0 to 76, and the temperature of CLIP's loss.
IGNORED = (EMBED_TOKENS, "position_ids", "logit_scale")
# In an original file of CLIP-L: not read, since SD3 takes its vector unprojected.
PROJECTION = "text_projection.weight"
# Of the text and the vision tower, in transformers' names and in OpenCLIP's.
CLIP_BLOCK = (
    Row("norm1", "layer_norm1", "ln_1"),
    # "in_proj_" goes on without a dot: PyTorch's MultiheadAttention has in_proj_weight,
    # q, k and v in one matrix.
    Row("to_qkv", tuple(f"self_attn.{name}_proj" for name in "qkv"), "attn.in_proj_"),
    Row("to_out", "self_attn.out_proj", "attn.out_proj", MERGING),
    Row("norm2", "layer_norm2", "ln_2"),
    Row("fc1", "mlp.fc1", "mlp.c_fc"),  # GPT-2's names
    Row("fc2", "mlp.fc2", "mlp.c_proj"),
)


def open_clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """A CLIP text tower; the original layout is that of OpenCLIP and OpenAI.

    `projected` says whether an original file has a text projection. CLIP-L's has none
    that is read: loading takes the identity.
    """
    # OpenCLIP's is a bare matrix (in, out), as ours, and no module with a weight (out,
    # in).
    names = "text_projection.weight", "text_projection"
    projection = Row("text_projection/kernel", *names, LINEAR, AS_IS)
    if not projected:
        # diffusers' folder has one for CLIP-L, so the parameter exists in any case.
        projection = projection._replace(original=None, fill=lambda s: np.eye(*s))
    embeddings = "text_model.embeddings"
    tokens = f"{embeddings}.token_embedding.weight", "token_embedding.weight"
    positions = f"{embeddings}.position_embedding.weight", "positional_embedding"
    ends = (
        Row("tokens", *tokens, AS_IS),
        Row("positions", *positions, AS_IS),
        Row("final_norm", "text_model.final_layer_norm", "ln_final"),
        projection,
    )
    files = ("text_model.encoder.layers.{}", "transformer.resblocks.{}")
    blocks = Group("blocks", *files, CLIP_BLOCK, range(model.depth))
    return [Group("", "", "", ends), blocks]


def clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """A CLIP text tower in transformers' names, in both layouts."""
    groups = open_clip_table(model, projected=projected)
    same = lambda rows: list(map(same_names, rows))
    return [x._replace(original=x.diffusers, rows=same(x.rows)) for x in groups]


def same_names(row: Row) -> Row:
    """The row with transformers' names in both layouts, if both have the tensor."""
    lacking = row.original is None
    return row if lacking else row._replace(original="", original_kind=None)


def t5_table(model: T5Encoder) -> list[Group]:
    """T5's encoder in transformers' names, which both layouts have."""
    # One table for all layers: transformers stores it in the first block.
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ends = (
        Row("embedding", SHARED, kind=AS_IS),  # shared with T5's decoder
        Row("stack/relative_bias", bias, kind=AS_IS),
        Row("stack/norm", "encoder.final_layer_norm"),
    )
    attn, mlp = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    block = (
        Row("norm_attn", "layer.0.layer_norm"),
        Row("to_qkv", tuple(f"{attn}.{name}" for name in "qkv")),
        Row("to_out", f"{attn}.o", kind=MERGING),
        Row("norm_mlp", "layer.1.layer_norm"),
        Row("wi", (f"{mlp}.wi_0", f"{mlp}.wi_1")),  # the gate first
        Row("wo", f"{mlp}.wo"),
    )
    files = ("encoder.block.{}",) * 2
    stack = Group("stack/blocks", *files, block, range(model.depth))
    return [Group("", "", "", ends), stack]
