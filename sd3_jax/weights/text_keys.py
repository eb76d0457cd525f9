"""Key tables of the text encoders, in transformers' and OpenCLIP's names."""

import numpy as np

from sd3_jax.models.clip import ClipText
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.weights.key_mapping import AS_IS, MERGING, Group, Row

# Ends of names that files may hold and no model reads: T5's embedding once more, the
# numbers 0 to 76, and the temperature of CLIP's loss.
IGNORED = ("encoder.embed_tokens.weight", "position_ids", "logit_scale")
# In an original file of CLIP-L: not read, since SD3 takes its vector unprojected.
PROJECTION = "text_projection.weight"
CLIP_BLOCK = (  # of the text and the vision tower
    Row("norm1", "layer_norm1"),
    Row("to_qkv", tuple(f"self_attn.{name}_proj" for name in "qkv")),
    Row("to_out", "self_attn.out_proj", kind=MERGING),
    Row("norm2", "layer_norm2"),
    Row("fc1", "mlp.fc1"),
    Row("fc2", "mlp.fc2"),
)


def clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """The table of a CLIP text tower in transformers' names.

    `projected` says whether an original file has a text projection. CLIP-L's has none
    that is read: loading takes the identity.
    """
    projection = Row("text_projection", "text_projection")
    if not projected:
        # diffusers' folder has one for CLIP-L, so the parameter exists in any case.
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
    """CLIP-L's table, whose original layout has no projection."""
    return clip_table(model, projected=False)


# "in_proj_" goes on without a dot: PyTorch's MultiheadAttention has in_proj_weight, q,
# k and v in one matrix.
OPEN_CLIP_BLOCK = (
    Row("norm1", None, "ln_1"),
    Row("to_qkv", None, "attn.in_proj_"),
    Row("to_out", None, "attn.out_proj", kind=MERGING),
    Row("norm2", None, "ln_2"),
    Row("fc1", None, "mlp.c_fc"),  # GPT-2's names
    Row("fc2", None, "mlp.c_proj"),
)


def open_clip_table(model: ClipText, *, projected: bool = True) -> list[Group]:
    """The same tower in OpenCLIP's and OpenAI's names, as the original layout."""
    # A bare matrix (in, out), as ours, and not a module with a weight (out, in).
    projection = Row("text_projection/kernel", None, "text_projection", AS_IS)
    if not projected:
        projection = projection._replace(original=None, fill=lambda s: np.eye(*s))
    ends = (
        Row("tokens", None, "token_embedding.weight", kind=AS_IS),
        Row("positions", None, "positional_embedding", kind=AS_IS),
        Row("final_norm", None, "ln_final"),
        projection,
    )
    files = ("", "transformer.resblocks.{}")  # diffusers has no such layout
    blocks = Group("blocks", *files, OPEN_CLIP_BLOCK, range(model.depth))
    return [Group("", "", "", ends), blocks]


def open_clip_l_table(model: ClipText) -> list[Group]:
    """CLIP-L in OpenCLIP's names, without a projection."""
    return open_clip_table(model, projected=False)


def t5_table(model: T5Encoder) -> list[Group]:
    """T5's encoder in transformers' names, which both layouts have."""
    # One table for all layers: transformers stores it in the first block.
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ends = (
        Row("embedding", "shared.weight", kind=AS_IS),  # shared with T5's decoder
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
