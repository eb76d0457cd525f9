"""The parts of a released model: which files hold them, what they are built from.

Configurations are diffusers' and transformers' own dictionaries, as their folders hold
them; of an original single file they are read off the names and shapes of its tensors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ShapeDtypeStruct as Shape
from jax.sharding import Mesh

from sd3_jax import sharding, tree
from sd3_jax.errors import UserError
from sd3_jax.models.clip import ClipText
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.models.vae import VAE
from sd3_jax.weights import controlnet, mmdit, text, vae
from sd3_jax.weights.names import Group

Shapes = Mapping[str, Any]  # tensors by name, of which only .shape is looked at


class Component(NamedTuple):
    """One part: its folder in diffusers' layout and its prefix in a single file.

    `mark` is a tensor that only this part has, by which it is found. `build(config,
    dtype)` makes the module, `example(module, config)` arguments for its init.
    `fuller` is the table of a single file of ours that holds what published ones lack.
    """

    folder: str
    prefix: str
    mark: str
    detect: Callable[[Shapes], dict]
    build: Callable[[dict, Any], nn.Module]
    example: Callable[[nn.Module, dict], tuple]
    table: Callable[[nn.Module], list[Group]]
    stem: str = "model"
    ignored: Sequence[str] = ()
    fuller: Callable[[nn.Module], list[Group]] | None = None


def abstract(
    component: Component, module: nn.Module, config: dict, mesh: Mesh, dtype: Any
) -> dict:
    """The part's variables as shapes with shardings; nothing is allocated."""
    example = lambda: component.example(module, config)
    boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), *example()))
    if isinstance(module, MMDiT | ControlNet):
        table = (1, module.pos_size**2, module.width)
        boxed["buffers"] = {"pos_embed": Shape(table, jnp.float32)}
    return jax.tree.map(
        lambda x, s: Shape(x.shape, jnp.dtype(dtype), sharding=s),
        tree.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )


# The denoiser


def detect_denoiser(x: Shapes) -> dict:
    width, channels, patch, _ = x["x_embedder.proj.weight"].shape
    layers = 1 + max(_number(k, 1) for k in x if k.startswith("joint_blocks."))
    dual = {_number(k, 1) for k in x if ".attn2." in k}
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": x["context_embedder.weight"].shape[1],
        "caption_projection_dim": width,
        "pooled_projection_dim": x["y_embedder.mlp.0.weight"].shape[1],
        "out_channels": x["final_layer.linear.weight"].shape[0] // patch**2,
        "pos_embed_max_size": math.isqrt(x["pos_embed"].shape[1]),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if any(".ln_q." in k for k in x) else None,
    }


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
    dual = list(config.get("dual_attention_layers") or ())
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    if dual != list(range(len(dual))):
        raise UserError(f"transformer: dual_attention_layers {dual}: wanted the first")
    if config["caption_projection_dim"] != heads * size:
        raise UserError(
            f"transformer: caption_projection_dim {config['caption_projection_dim']}:"
            f" wanted num_attention_heads x attention_head_dim = {heads * size}"
        )
    if config.get("qk_norm") not in (None, "rms_norm"):
        raise UserError(f"transformer: qk_norm {config['qk_norm']}: wanted rms_norm")
    return MMDiT(
        depth=config["num_layers"],
        width=heads * size,
        num_heads=heads,
        patch=config.get("patch_size", 2),
        channels=config.get("out_channels", 16),
        qk_norm=config.get("qk_norm") is not None,
        dual_blocks=len(dual),
        pos_size=config.get("pos_embed_max_size", 96),
        dtype=dtype,
        remat="none",
    )


def example_denoiser(module: MMDiT, config: dict) -> tuple:
    side = module.patch
    return (
        jnp.zeros((1, side, side, config.get("in_channels", 16))),
        jnp.zeros(1),
        jnp.zeros((1, 1, config["joint_attention_dim"])),
        jnp.zeros((1, config["pooled_projection_dim"])),
    )


# The autoencoder


def detect_vae(x: Shapes) -> dict:
    downs = 1 + max(_number(k, 2) for k in x if k.startswith("encoder.down."))
    out = [x[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(downs)]
    layers = {_number(k, 4) for k in x if k.startswith("encoder.down.0.block.")}
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * downs,
        "up_block_types": ["UpDecoderBlock2D"] * downs,
        "block_out_channels": out,
        "layers_per_block": len(layers),
        "act_fn": "silu",
        "latent_channels": x["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in x,
        "use_post_quant_conv": "post_quant_conv.weight" in x,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in x,
    }


def build_vae(config: dict, dtype: Any) -> VAE:
    for name in ("use_quant_conv", "use_post_quant_conv"):
        if config.get(name, True):
            raise UserError(f"vae: {name} is true: SD3's autoencoder has none")
    return VAE(
        channels=tuple(config["block_out_channels"]),
        latent_channels=config["latent_channels"],
        layers=config["layers_per_block"],
        groups=config.get("norm_num_groups", 32),
        mid_attention=config.get("mid_block_add_attention", True),
        dtype=dtype,
    )


def example_vae(module: VAE, config: dict) -> tuple:
    side = 2 ** (len(module.channels) - 1)
    return (jnp.zeros((1, side, side, 3)),)


# The text encoders


def detect_clip_l(x: Shapes) -> dict:
    return detect_clip(x) | {"hidden_act": "quick_gelu"}


def detect_clip_g(x: Shapes) -> dict:
    return detect_clip(x) | {"hidden_act": "gelu"}


def detect_clip(x: Shapes) -> dict:
    vocab, width = x["text_model.embeddings.token_embedding.weight"].shape
    layers = 1 + max(_number(k, 3) for k in x if ".encoder.layers." in k)
    projection = x.get("text_projection.weight")
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": x["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": x[
            "text_model.embeddings.position_embedding.weight"
        ].shape[0],
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as in the published files: the end is the largest id
        "pad_token_id": 1,
    }


def build_clip(config: dict, dtype: Any) -> ClipText:
    return ClipText(
        vocab=config["vocab_size"],
        length=config["max_position_embeddings"],
        depth=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        mlp=config["intermediate_size"],
        activation=config["hidden_act"],
        projection=config["projection_dim"],
        eos=config.get("eos_token_id", 49407),
        dtype=dtype,
    )


def example_clip(module: ClipText, config: dict) -> tuple:
    return (jnp.zeros((1, module.length), jnp.int32),)


def detect_t5(x: Shapes) -> dict:
    block = "encoder.block.0.layer."
    vocab, width = x["shared.weight"].shape
    buckets, heads = x[f"{block}0.SelfAttention.relative_attention_bias.weight"].shape
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": x[f"{block}0.SelfAttention.q.weight"].shape[0] // heads,
        "d_ff": x[f"{block}1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": 1 + max(_number(k, 2) for k in x if k.startswith("encoder.bl")),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def build_t5(config: dict, dtype: Any) -> T5Encoder:
    if config.get("feed_forward_proj") != "gated-gelu":
        kind = config.get("feed_forward_proj")
        raise UserError(f"text_encoder_3: feed_forward_proj {kind}: wanted gated-gelu")
    return T5Encoder(
        vocab=config["vocab_size"],
        depth=config["num_layers"],
        width=config["d_model"],
        num_heads=config["num_heads"],
        head_size=config["d_kv"],
        mlp=config["d_ff"],
        dtype=dtype,
    )


def example_t5(module: T5Encoder, config: dict) -> tuple:
    return (jnp.zeros((1, 8), jnp.int32),)


def _number(key: str, place: int) -> int:
    return int(key.split(".")[place])


CLIP = (build_clip, example_clip)
LAST_NORM = "text_model.final_layer_norm.weight"
COMPONENTS = {
    "denoiser": Component(
        "transformer",
        "model.diffusion_model.",
        "joint_blocks.0.x_block.attn.qkv.weight",
        detect_denoiser,
        build_denoiser,
        example_denoiser,
        mmdit.table,
        "diffusion_pytorch_model",
    ),
    "vae": Component(
        "vae",
        "first_stage_model.",
        "decoder.conv_in.weight",
        detect_vae,
        build_vae,
        example_vae,
        vae.table,
        "diffusion_pytorch_model",
    ),
    "clip_l": Component(
        "text_encoder",
        "text_encoders.clip_l.transformer.",
        LAST_NORM,
        detect_clip_l,
        *CLIP,
        text.clip_l_table,
        ignored=(*text.IGNORED, text.PROJECTION),
        fuller=text.clip_table,
    ),
    "clip_g": Component(
        "text_encoder_2",
        "text_encoders.clip_g.transformer.",
        LAST_NORM,
        detect_clip_g,
        *CLIP,
        text.clip_table,
        ignored=text.IGNORED,
    ),
    "t5": Component(
        "text_encoder_3",
        "text_encoders.t5xxl.transformer.",
        "encoder.final_layer_norm.weight",
        detect_t5,
        build_t5,
        example_t5,
        text.t5_table,
        ignored=text.IGNORED,
    ),
}
CONTROLNET = Component(
    "controlnet",
    "",
    "controlnet_blocks.0.weight",
    controlnet.detect,
    controlnet.build,
    controlnet.example,
    controlnet.table,
    "diffusion_pytorch_model",
    ignored=(controlnet.CONTROL_TYPE,),  # read by controlnet.control_type
)


def released_name(config: dict) -> str:
    """What people call the denoiser of this configuration."""
    qk, dual = config.get("qk_norm"), config.get("dual_attention_layers")
    sizes = config["num_layers"], config["num_attention_heads"]
    names = {
        (24, False, 0): "SD3-medium",
        (24, True, 13): "SD3.5-medium",
        (38, True, 0): "SD3.5-large or -turbo",
    }
    name = names.get((sizes[0], bool(qk), len(dual or ())), "an SD3 transformer")
    return (
        f"{name}: depth {sizes[0]}, width {sizes[1] * config['attention_head_dim']},"
        f" {'qk-norm' if qk else 'no qk-norm'}, {len(dual or ())} dual blocks"
    )
