"""The MMDiT's key table; diffusers splits qkv and swaps two shift-scale pairs."""

from sd3_jax.models.mmdit import MMDiT
from sd3_jax.weights.key_mapping import (
    AS_IS,
    LINEAR,
    MERGING,
    SWAPPED,
    Group,
    Row,
    patches,
)


def stream(
    ours: str, norm: str, qkv: str, norms: str, out: str, mlp: str, original: str
):
    """All rows of one stream; rows without a parameter in the model are not used."""
    # The released files fuse q, k and v as we do; diffusers has three matrices.
    q, k, v = (qkv.format(letter) for letter in "qkv")
    return (
        # adaLN_modulation.0 and diffusers' norm1.silu have no weights.
        Row(f"{ours}/adaln/linear", f"{norm}.linear", f"{original}.adaLN_modulation.1"),
        Row(f"{ours}/attn/to_qkv", (q, k, v), f"{original}.attn.qkv"),
        # qk-norm: in SD3.5's files, not in SD3-medium's.
        Row(f"{ours}/attn/norm_q", norms.format("q"), f"{original}.attn.ln_q"),
        Row(f"{ours}/attn/norm_k", norms.format("k"), f"{original}.attn.ln_k"),
        Row(f"{ours}/attn/to_out", out, f"{original}.attn.proj", MERGING),
        # diffusers' FeedForward: net.0 projects and has the GELU, net.1 is dropout.
        Row(f"{ours}/mlp/fc1", f"{mlp}.net.0.proj", f"{original}.mlp.fc1"),
        Row(f"{ours}/mlp/fc2", f"{mlp}.net.2", f"{original}.mlp.fc2"),
    )


# diffusers names image weights plainly and text weights "context" or "added".
IMAGE = stream(
    "image", "norm1", "attn.to_{}", "attn.norm_{}", "attn.to_out.0", "ff", "x_block"
)
TEXT = stream(
    "text",
    "norm1_context",
    "attn.add_{}_proj",
    "attn.norm_added_{}",
    "attn.to_add_out",
    "ff_context",
    "context_block",
)
# MMDiT-X's second attention, of SD3.5-medium's first 13 blocks. Its adaLN chunks are
# the last 3 of the block's 9, so norm1 covers them.
DUAL = (
    Row(
        "image/attn2/to_qkv",
        ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block.attn2.qkv",
    ),
    Row("image/attn2/norm_q", "attn2.norm_q", "x_block.attn2.ln_q"),
    Row("image/attn2/norm_k", "attn2.norm_k", "x_block.attn2.ln_k"),
    Row("image/attn2/to_out", "attn2.to_out.0", "x_block.attn2.proj", MERGING),
)
# adaLN of the two norms that have no gate. The released code has shift before scale
# everywhere, diffusers' AdaLayerNormContinuous scale before shift.
LAST_TEXT = TEXT[0]._replace(kind=SWAPPED, original_kind=LINEAR)
FINAL = Row(
    "final_adaln/linear",
    "norm_out.linear",
    "final_layer.adaLN_modulation.1",
    SWAPPED,
    LINEAR,
)


def positions_row(patch: int, original: str = "x_embedder.proj") -> tuple[Row, Row]:
    """Rows of the stored position table and of the patch embedding."""
    table = "pos_embed" if original else ""  # "": as in diffusers, for ControlNets
    return (
        Row("pos_embed", "pos_embed.pos_embed", table, AS_IS),
        Row("patch_embed", "pos_embed.proj", original, patches(patch)),
    )


def time_and_pooled() -> tuple[Row, ...]:
    """Rows of the embedders of time and of the pooled text, Linear-SiLU-Linear."""
    time, text = (
        f"time_text_embed.{name}_embedder.linear_" for name in ("timestep", "text")
    )
    return (
        Row("time_embed/fc1", f"{time}1", "t_embedder.mlp.0"),  # mlp.1 is the SiLU
        Row("time_embed/fc2", f"{time}2", "t_embedder.mlp.2"),
        Row("pooled_embed/fc1", f"{text}1", "y_embedder.mlp.0"),
        Row("pooled_embed/fc2", f"{text}2", "y_embedder.mlp.2"),
    )


def ends(patch: int) -> tuple[Row, ...]:
    """Rows of the layers before and after the blocks."""
    return (
        *positions_row(patch),
        Row("context_embed", "context_embedder"),
        *time_and_pooled(),
        FINAL,
        Row("final", "proj_out", "final_layer.linear"),
    )


def table(model: MMDiT) -> list[Group]:
    """The table of an MMDiT with two weight sets, as all published ones have."""
    files = ("transformer_blocks.{}", "joint_blocks.{}")
    dual, last = model.dual_blocks, model.depth - 1
    return [
        Group("", "", "", ends(model.patch)),
        Group("dual_blocks", *files, IMAGE + TEXT + DUAL, range(dual)),
        Group("blocks", *files, IMAGE + TEXT, range(dual, last)),
        # Its text stream ends at keys and values: adaLN without gate, no MLP.
        Group(
            "last_block",
            *(name.format(last) for name in files),
            (*IMAGE, LAST_TEXT, *TEXT[1:]),
        ),
    ]
