"""A whole CLIP, transformers' CLIPModel: the names and configurations of two towers."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sd3_jax.errors import UserError
from sd3_jax.models.clip_vision import ClipVision
from sd3_jax.weights import text
from sd3_jax.weights.components import Component, Shapes, build_clip, detect_clip
from sd3_jax.weights.components import example_clip as example_text
from sd3_jax.weights.names import AS_IS, Group, Row, patches

SIDES = ("vision_model.", "visual_projection.")  # what the vision tower's names begin
OPENAI = (768, 1024)  # widths of its ViT-B and ViT-L, with quick_gelu, heads of 64
IGNORED = ("position_ids", "logit_scale")


def vision_table(model: ClipVision) -> list[Group]:
    embeddings = "vision_model.embeddings"
    place = f"{embeddings}.position_embedding.weight"
    ends = (
        Row("patch_embed", f"{embeddings}.patch_embedding", kind=patches(model.patch)),
        Row("class_token", f"{embeddings}.class_embedding", kind=AS_IS),
        Row("positions", place, kind=AS_IS),
        Row("first_norm", "vision_model.pre_layrnorm"),  # their spelling
        Row("final_norm", "vision_model.post_layernorm"),
        Row("visual_projection", "visual_projection"),
    )
    files = ("vision_model.encoder.layers.{}",) * 2
    blocks = Group("blocks", *files, text.CLIP_BLOCK, range(model.depth))
    return [Group("", "", "", ends), blocks]


def detect_vision(x: Shapes) -> dict:
    width, _, patch, _ = x["vision_model.embeddings.patch_embedding.weight"].shape
    places = x["vision_model.embeddings.position_embedding.weight"].shape[0]
    layers = {int(k.split(".")[3]) for k in x if ".encoder.layers." in k}
    if width not in OPENAI:
        raise UserError(
            f"a vision tower of width {width}: a file alone is read as OpenAI's ViT-B"
            " or ViT-L; wanted a folder, with its config.json"
        )
    return {
        "hidden_size": width,
        "intermediate_size": x["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": x["visual_projection.weight"].shape[0],
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": width // 64,
        "num_channels": 3,
        "image_size": patch * math.isqrt(places - 1),
        "patch_size": patch,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }


def detect_text(x: Shapes) -> dict:
    return detect_clip(x) | {"hidden_act": "quick_gelu"}


def build_vision(config: dict, dtype: Any) -> ClipVision:
    eps = config.get("layer_norm_eps", 1e-5)
    if config.get("num_channels", 3) != 3 or eps != 1e-5:
        raise UserError(
            f"vision_config: num_channels {config.get('num_channels', 3)},"
            f" layer_norm_eps {eps}: wanted 3 and 1e-05"
        )
    return ClipVision(
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        projection=config["projection_dim"],
        activation=config["hidden_act"],
        size=config["image_size"],
        patch=config["patch_size"],
        dtype=dtype,
    )


def example_vision(module: ClipVision, config: dict) -> tuple:
    return (jnp.zeros((1, module.size, module.size, 3)),)


def towers(config: Mapping[str, Any]) -> dict[str, dict]:
    """The two towers' configurations of a CLIPModel's, defaults filled in."""
    from transformers import CLIPTextConfig, CLIPVisionConfig

    kinds = {"vision": CLIPVisionConfig, "text": CLIPTextConfig}
    size = {"projection_dim": config.get("projection_dim", 512)}
    return {
        name: kind(**(config.get(f"{name}_config") or {})).to_dict() | size
        for name, kind in kinds.items()
    }


VISION = Component(
    "",
    "",
    "vision_model.post_layernorm.weight",
    detect_vision,
    build_vision,
    example_vision,
    vision_table,
    "model",
    ignored=IGNORED,
)
TEXT = Component(
    "",
    "",
    "text_model.final_layer_norm.weight",
    detect_text,
    build_clip,
    example_text,
    text.clip_table,
    "model",
    ignored=IGNORED,
)
TOWERS = {"vision": VISION, "text": TEXT}
