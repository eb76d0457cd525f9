"""The components of a released model: their files, configurations and modules.

Configurations are diffusers' and transformers', from a folder or inferred from a single
file's tensors; published_configs refuses what is not implemented.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ShapeDtypeStruct as Shape
from jax.sharding import Mesh

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.foreign_text import shown
from sd3_jax.models.clip import ClipText
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.weights import (
    autoencoders,
    controlnet_keys,
    inferred_sizes,
    mmdit_keys,
    published_configs,
    text_keys,
)
from sd3_jax.weights.inferred_sizes import Shapes
from sd3_jax.weights.key_mapping import Group

log = logging.getLogger(__name__)


class Component(NamedTuple):
    """One component: its folder in diffusers' layout, its prefix in a single file.

    `mark` is a tensor that only this component has. `kind` names the table of its
    configuration. `build(config, dtype)` makes the module, `example(module, config)`
    arguments for its init. `fuller` is the table of a single file of ours, which holds
    what published ones lack.
    """

    folder: str
    prefix: str
    mark: str
    kind: str
    build: Callable[[dict, Any], nn.Module]
    example: Callable[[nn.Module, dict], tuple]
    table: Callable[[nn.Module], list[Group]]
    stem: str = "model"
    ignored: Sequence[str] = ()
    fuller: Callable[[nn.Module], list[Group]] | None = None


def configured(
    component: Component,
    config: Any,
    tensors: Shapes | None = None,
    layout: str = "diffusers",
    where: str = "",
) -> dict:
    """A component's configuration with defaults, checked against its tensors.

    A `config` of None is inferred from the tensors. Raises UserError, which begins
    with `where`.
    """
    # All before anything is traced: a wrong size would be an error deep inside XLA.
    kind = component.kind
    if kind == "vae" and autoencoders.is_tiny(config, tensors):
        kind = "taesd"
    if config is None:
        # A single file, or a ControlNet's without its config.json.
        config = inferred_sizes.detect(kind, tensors, where, layout=layout)
    config = published_configs.read(kind, config, where)
    if names := published_configs.unknown(kind, config):
        message = "%s: ignored fields: %s"
        log.warning(message, where, shown(", ".join(names), 200))
    if tensors is not None:
        published_configs.agree(kind, config, tensors, layout, where)
    return config


def abstract(
    component: Component, module: nn.Module, config: dict, mesh: Mesh, dtype: Any
) -> dict:
    """The component's variables as shapes with shardings; nothing is allocated."""
    example = lambda: component.example(module, config)
    # Boxed leaves have their logical axes, from which shardings follow.
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *example()))
    # Released files hold a position table, which is no parameter of ours.
    if isinstance(module, MMDiT | ControlNet):
        table = (1, module.pos_size**2, module.width)
        boxed["buffers"] = {"pos_embed": Shape(table, jnp.float32)}
    return jax.tree.map(
        lambda x, s: Shape(x.shape, jnp.dtype(dtype), sharding=s),
        tree.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )


# --- the denoiser


def denoiser_config(
    model: MMDiT, *, sample_size: int, context_dim: int, pooled_dim: int
) -> dict:
    """diffusers' configuration of a model of ours, the inverse of build_denoiser."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": sample_size,
        "patch_size": model.patch,
        "in_channels": model.channels,
        "num_layers": model.depth,
        "attention_head_dim": model.width // model.num_heads,
        "num_attention_heads": model.num_heads,
        "joint_attention_dim": context_dim,
        "caption_projection_dim": model.width,
        "pooled_projection_dim": pooled_dim,
        "out_channels": model.channels,
        "pos_embed_max_size": model.pos_size,
        "dual_attention_layers": list(range(model.dual_blocks)),
        "qk_norm": "rms_norm" if model.qk_norm else None,
    }


def build_denoiser(config: dict, dtype: Any) -> MMDiT:
    """The module of diffusers' SD3Transformer2DModel configuration."""
    c = published_configs.read("denoiser", config)
    return MMDiT(
        depth=c["num_layers"],
        width=c["caption_projection_dim"],
        num_heads=c["num_attention_heads"],
        patch=c["patch_size"],
        channels=c["out_channels"],  # equal to in_channels: see published_configs
        qk_norm=c["qk_norm"] is not None,
        dual_blocks=len(c["dual_attention_layers"]),  # the first so many
        pos_size=c["pos_embed_max_size"],
        dtype=dtype,
        remat="none",
    )


def example_denoiser(module: MMDiT, config: dict) -> tuple:
    side = module.patch  # one token: parameters do not depend on the size
    return (
        jnp.zeros((1, side, side, config.get("in_channels", 16))),
        jnp.zeros(1),
        jnp.zeros((1, 1, config["joint_attention_dim"])),
        jnp.zeros((1, config["pooled_projection_dim"])),
    )


# --- the text encoders


def build_clip(config: dict, dtype: Any) -> ClipText:
    """The module of transformers' CLIPTextConfig."""
    c = published_configs.read("clip_text", config)
    return ClipText(
        vocab=c["vocab_size"],
        length=c["max_position_embeddings"],
        depth=c["num_hidden_layers"],
        width=c["hidden_size"],
        num_heads=c["num_attention_heads"],
        mlp=c["intermediate_size"],
        activation=c["hidden_act"],
        projection=c["projection_dim"],
        eos=c["eos_token_id"],
        dtype=dtype,
    )


def example_clip(module: ClipText, config: dict) -> tuple:
    return (jnp.zeros((1, module.length), jnp.int32),)


def build_t5(config: dict, dtype: Any) -> T5Encoder:
    """The module of transformers' T5Config, its encoder alone."""
    c = published_configs.read("t5", config)
    return T5Encoder(
        vocab=c["vocab_size"],
        depth=c["num_layers"],
        width=c["d_model"],
        num_heads=c["num_heads"],
        head_size=c["d_kv"],
        mlp=c["d_ff"],
        dtype=dtype,
    )


def example_t5(module: T5Encoder, config: dict) -> tuple:
    return (jnp.zeros((1, 8), jnp.int32),)  # any length will do


CLIP = (build_clip, example_clip)
# Both CLIPs have it: which of the two a file is, single_file tells by its width.
LAST_NORM = "text_model.final_layer_norm.weight"
COMPONENTS = {
    "denoiser": Component(
        "transformer",
        "model.diffusion_model.",
        "joint_blocks.0.x_block.attn.qkv.weight",
        "denoiser",  # key of published_configs.TABLES
        build_denoiser,
        example_denoiser,
        mmdit_keys.table,
        "diffusion_pytorch_model",
    ),
    "vae": Component(
        "vae",
        "first_stage_model.",
        "decoder.conv_in.weight",
        "vae",
        autoencoders.build,
        autoencoders.example,
        autoencoders.table,
        "diffusion_pytorch_model",
    ),
    "clip_l": Component(
        "text_encoder",
        "text_encoders.clip_l.transformer.",
        LAST_NORM,
        "clip_l",
        *CLIP,
        # Original files have no projection that is read.
        functools.partial(text_keys.clip_table, projected=False),
        ignored=(*text_keys.IGNORED, text_keys.PROJECTION),
        fuller=text_keys.clip_table,
    ),
    "clip_g": Component(
        "text_encoder_2",
        "text_encoders.clip_g.transformer.",
        LAST_NORM,
        "clip_g",
        *CLIP,
        text_keys.clip_table,
        ignored=text_keys.IGNORED,
    ),
    "t5": Component(
        "text_encoder_3",
        "text_encoders.t5xxl.transformer.",
        "encoder.final_layer_norm.weight",
        "t5",
        build_t5,
        example_t5,
        text_keys.t5_table,
        ignored=text_keys.IGNORED,
    ),
}
CONTROLNET = Component(
    "controlnet",
    "",
    "controlnet_blocks.0.weight",
    "controlnet",
    controlnet_keys.build,
    controlnet_keys.example,
    controlnet_keys.table,
    "diffusion_pytorch_model",
    ignored=(controlnet_keys.CONTROL_TYPE,),  # read by controlnet_keys.control_type
)


def released_name(config: dict) -> str:
    """The common name and the sizes of the denoiser of a configuration."""
    # Stability publishes no name in the configuration: the sizes tell.
    qk, dual = config.get("qk_norm"), len(config.get("dual_attention_layers") or ())
    depth = config["num_layers"]
    names = {  # by depth, qk-norm and number of dual blocks
        (24, False, 0): "SD3-medium",  # 2B
        (24, True, 13): "SD3.5-medium",
        (38, True, 0): "SD3.5-large or -turbo",  # 8B; the same sizes
    }
    name = names.get((depth, bool(qk), dual), "an SD3 transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    norm = "qk-norm" if qk else "no qk-norm"
    return f"{name}: depth {depth}, width {width}, {norm}, {dual} dual blocks"
