"""ControlNets: key table, module, and what their files say about hints."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.weights import published_configs
from sd3_jax.weights.key_mapping import Group, Row, patches
from sd3_jax.weights.mmdit_keys import DUAL, IMAGE, TEXT, positions_row, time_and_pooled

HINT = "pos_embed_input.proj.weight"  # the convolution that reads the hint
# SD3.5-large's files say what their hints are by a tensor of this name, int32 [1].
CONTROL_TYPE = "control_type"
CONTROL_TYPES = ("blur", "canny", "depth")  # by the tensor's value
FAMILIES = {  # other kinds of file, by a part of a tensor's name
    "controlnet_x_embedder.": "a ControlNet of FLUX or Qwen-Image",
    "double_blocks.": "of FLUX",
    "controlnet_cond_embedding.": "a ControlNet of SD1.5, SD2 or SDXL",
    "input_hint_block.": "a ControlNet of SD1.5, SD2 or SDXL",
    "zero_convs.": "a ControlNet of SD1.5, SD2 or SDXL",
    "lora_controlnet": "a control LoRA of SDXL",
    "joint_blocks.": "a denoiser",
}


def table(model: ControlNet) -> list[Group]:
    """The table of a ControlNet of joint blocks or of a single stream.

    The original layout is that of SD3.5-large's single-stream files: diffusers' names
    outside the blocks, the released code's inside.
    """
    ends = (
        *(row._replace(original="") for row in time_and_pooled()),  # as in diffusers
        Row("hint_embed", "pos_embed_input.proj", kind=patches(model.patch)),
    )
    # A single stream borrows positions and patch embedding from its denoiser.
    if model.joint:
        ends += (
            *positions_row(model.patch, original=""),
            Row("context_embed", "context_embedder"),
        )
    dual = model.dual_blocks
    # The released code says x_block only where there are two streams.
    image = tuple(
        row._replace(original=row.original.removeprefix("x_block.")) for row in IMAGE
    )
    blocks = image + TEXT if model.joint else image
    files = ("transformer_blocks.{}",) * 2
    zero = (Row("zero", ""),)  # controlnet_blocks.N is the linear map itself
    groups = [Group("", "", "", ends)]
    for ours, rows, layers in (
        ("dual_blocks", blocks + DUAL, range(dual)),
        ("blocks", blocks, range(dual, model.depth)),
    ):
        # ControlBlock has the denoiser's Block as "block", and the map out of it.
        groups.append(Group(f"{ours}/block", *files, rows, layers))
        groups.append(Group(ours, *("controlnet_blocks.{}",) * 2, zero, layers))
    return groups


def build(config: dict, dtype: Any) -> ControlNet:
    """The module of diffusers' SD3ControlNetModel configuration."""
    c = published_configs.read("controlnet", config)
    return ControlNet(
        depth=c["num_layers"],
        width=c["num_attention_heads"] * c["attention_head_dim"],
        num_heads=c["num_attention_heads"],
        patch=c["patch_size"],
        hint_channels=c["in_channels"] + c["extra_conditioning_channels"],
        qk_norm=c["qk_norm"] is not None,
        dual_blocks=len(c["dual_attention_layers"]),
        joint=c["joint_attention_dim"] is not None,  # null: image tokens alone
        zero_pooled=c["force_zeros_for_pooled_projection"],
        pos_size=c["pos_embed_max_size"] or 192,
        dtype=dtype,
    )


def example(module: ControlNet, config: dict) -> tuple:
    """Arguments to initialise the module with."""
    side = module.patch
    return (
        jnp.zeros((1, side, side, config.get("in_channels", 16))),
        jnp.zeros(1),
        jnp.zeros((1, 1, config.get("joint_attention_dim") or 1)),
        jnp.zeros((1, config["pooled_projection_dim"])),
        jnp.zeros((1, side, side, module.hint_channels)),
    )


def require_family(path: Any, tensors: Mapping[str, Any], config: Mapping) -> None:
    """UserError if a file is not a ControlNet of SD3, by its configuration or names."""
    kind = config.get("_class_name", "SD3ControlNetModel")
    if kind != "SD3ControlNetModel":
        raise UserError(
            f"{path}: config.json is of {shown(kind)}; expected SD3ControlNetModel, a"
            " ControlNet for SD3 or SD3.5"
        )
    wanted = ("controlnet_blocks.0.weight", HINT)
    if all(key in tensors for key in wanted):
        return
    families = (FAMILIES[part] for part in FAMILIES if any(part in k for k in tensors))
    few = ", ".join(list(tensors)[:3])
    raise UserError(
        f"{path}: {next(families, f'holds {few}, …')}; expected a ControlNet of SD3 or"
        f" SD3.5, which has {wanted[0]} and {wanted[1]}"
    )


def hint_channels(tensors: Mapping[str, Any], config: Mapping) -> dict:
    """{"extra_conditioning_channels": n} as the tensors have it."""
    # alimama's published inpainting configuration leaves it to whoever loads the net.
    shape, plain = tensors[HINT].shape, config.get("in_channels", 16)
    if type(plain) is not int or len(shape) != 4:
        return {}  # an error where the field and the shape are checked
    return {"extra_conditioning_channels": shape[1] - plain}


def control_type(path: Any, tensors: Mapping[str, Any], config: Mapping) -> dict:
    """{"control_type": "canny"} from the tensors, else from the configuration.

    {} if neither has it. Raises UserError for a value that is not a CONTROL_TYPES.
    """
    kind = config.get(CONTROL_TYPE)
    if (tensor := tensors.get(CONTROL_TYPE)) is not None:
        # Shape [1] or a scalar, and any dtype: compared as a number.
        value = tensor.read().reshape(-1).astype(np.float64)
        kind = value.item() if value.size == 1 else value.tolist()
    if kind is None:
        return {}
    if type(kind) in (int, float) and kind in range(len(CONTROL_TYPES)):
        kind = CONTROL_TYPES[int(kind)]
    if kind not in CONTROL_TYPES:
        raise UserError(
            f"{path}: control_type {shown(kind)}: expected 0 (blur), 1 (canny) or 2"
            " (depth)"
        )
    return {CONTROL_TYPE: kind}


def without_borrowed(net: ControlNet, variables: Mapping) -> dict:
    """A net's variables without those that it borrows from the denoiser, to save."""
    if not net.borrowed:
        return dict(variables)
    params = {k: v for k, v in variables["params"].items() if k != "patch_embed"}
    return {"params": params}
