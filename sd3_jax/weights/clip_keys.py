"""Key tables and configurations of a whole CLIP (transformers' CLIPModel)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from sd3_jax.models.clip_vision import ClipVision
from sd3_jax.weights import published_configs, text_keys
from sd3_jax.weights.components import Component, build_clip
from sd3_jax.weights.components import example_clip as example_text
from sd3_jax.weights.key_mapping import AS_IS, Group, Row, patches

SIDES = ("vision_model.", "visual_projection.")  # prefixes of the vision tower's names
IGNORED = ("position_ids", "logit_scale")  # 0, 1, 2, ... and the loss's temperature


def vision_table(model: ClipVision) -> list[Group]:
    """The vision tower's table; original files have the same names."""
    embeddings = "vision_model.embeddings"
    place = f"{embeddings}.position_embedding.weight"
    ends = (
        Row("patch_embed", f"{embeddings}.patch_embedding", kind=patches(model.patch)),
        # A bare parameter (d,), neither kernel nor embedding.
        Row("class_token", f"{embeddings}.class_embedding", kind=AS_IS),
        Row("positions", place, kind=AS_IS),
        Row("first_norm", "vision_model.pre_layrnorm"),  # transformers' spelling
        Row("final_norm", "vision_model.post_layernorm"),
        Row("visual_projection", "visual_projection"),
    )
    files = ("vision_model.encoder.layers.{}",) * 2  # the same in both layouts
    rows = list(map(text_keys.same_names, text_keys.CLIP_BLOCK))
    blocks = Group("blocks", *files, rows, range(model.depth))
    return [Group("", "", "", ends), blocks]


def build_vision(config: dict, dtype: Any) -> ClipVision:
    """The module of a CLIPVisionConfig."""
    c = published_configs.read("clip_vision", config)
    return ClipVision(
        depth=c["num_hidden_layers"],
        width=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        mlp=c["intermediate_size"],
        projection=c["projection_dim"],
        activation=c["hidden_act"],
        size=c["image_size"],
        patch=c["patch_size"],
        dtype=dtype,
    )


def example_vision(module: ClipVision, config: dict) -> tuple:
    """Arguments to initialise the module with."""
    return (jnp.zeros((1, module.size, module.size, 3)),)


def towers(config: Mapping[str, Any], where: str = "config") -> dict[str, dict]:
    """Checked configurations of a CLIPModel's towers, "vision" and "text"."""
    # transformers gives the whole model's projection_dim precedence over the towers'.
    size = {"projection_dim": config.get("projection_dim", 512)}
    configs = {}
    for name, component in TOWERS.items():
        fields, file = {}, f"{where}: {name}_config"
        # Old files have text_config_dict too, which overrules text_config there.
        for part in (config.get(f"{name}_config{end}") for end in ("", "_dict")):
            if part is not None:
                fields |= published_configs.read(component.kind, part, file)
        configs[name] = published_configs.read(component.kind, fields | size, file)
    return configs


# A CLIPModel is one file with both towers: no folder and no prefix of their own.
VISION = Component(
    "",
    "",
    "vision_model.post_layernorm.weight",
    "clip_vision",
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
    "clip_text",
    build_clip,
    example_text,
    text_keys.clip_table,
    "model",
    ignored=IGNORED,
)
TOWERS = {"vision": VISION, "text": TEXT}
