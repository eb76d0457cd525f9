"""ControlNets: their names in files, and what of a denoiser they are built from."""

from typing import Any

import jax.numpy as jnp

from sd3_jax.models.controlnet import ControlNet
from sd3_jax.weights import configs
from sd3_jax.weights.mmdit import DUAL, IMAGE, TEXT, positions_row, time_and_pooled
from sd3_jax.weights.names import Group, Row, patches


def table(model: ControlNet) -> list[Group]:
    """The original single-stream file has diffusers' names outside the blocks, and in
    them those of the released code."""
    ends = (
        *(row._replace(original="") for row in time_and_pooled()),
        Row("hint_embed", "pos_embed_input.proj", kind=patches(model.patch)),
    )
    if model.joint:
        ends += (
            *positions_row(model.patch, original=""),
            Row("context_embed", "context_embedder"),
        )
    dual = model.dual_blocks
    image = tuple(
        row._replace(original=row.original.removeprefix("x_block.")) for row in IMAGE
    )
    blocks = image + TEXT if model.joint else image
    files = ("transformer_blocks.{}",) * 2
    zero = (Row("zero", ""),)
    groups = [Group("", "", "", ends)]
    for ours, rows, layers in (
        ("dual_blocks", blocks + DUAL, range(dual)),
        ("blocks", blocks, range(dual, model.depth)),
    ):
        groups.append(Group(f"{ours}/block", *files, rows, layers))
        groups.append(Group(ours, *("controlnet_blocks.{}",) * 2, zero, layers))
    return groups


def build(config: dict, dtype: Any) -> ControlNet:
    c = configs.read("controlnet", config)
    return ControlNet(
        depth=c["num_layers"],
        width=c["num_attention_heads"] * c["attention_head_dim"],
        num_heads=c["num_attention_heads"],
        patch=c["patch_size"],
        hint_channels=c["in_channels"] + c["extra_conditioning_channels"],
        qk_norm=c["qk_norm"] is not None,
        dual_blocks=len(c["dual_attention_layers"]),
        joint=c["joint_attention_dim"] is not None,
        zero_pooled=c["force_zeros_for_pooled_projection"],
        pos_size=c["pos_embed_max_size"] or 192,
        dtype=dtype,
    )


def example(module: ControlNet, config: dict) -> tuple:
    side = module.patch
    return (
        jnp.zeros((1, side, side, config.get("in_channels", 16))),
        jnp.zeros(1),
        jnp.zeros((1, 1, config.get("joint_attention_dim") or 1)),
        jnp.zeros((1, config["pooled_projection_dim"])),
        jnp.zeros((1, side, side, module.hint_channels)),
    )
