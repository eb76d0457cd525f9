"""Every tensor of the published models, at full size and without memory for one."""

import diffusers
import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils

from sd3_jax.distributed import sharding
from sd3_jax.weights import components, key_mapping, text_keys
from sd3_jax.weights.encoder_configs import CONFIGS

COUNTS = {
    "sd3_medium": 2_028_328_000,
    "sd35_medium": 2_243_171_520,
    "sd35_large": 8_056_627_520,
    "vae": 83_819_683,
    "clip_l": 123_060_480 + 768**2,  # and a projection, which single files leave out
    "clip_g": 694_659_840,
    "t5": 4_762_310_656,
}


def transformer(layers, table, **options):
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=layers,
        num_attention_heads=layers,
        caption_projection_dim=64 * layers,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        pos_embed_max_size=table,
        **options,
    )


MODELS = {
    "sd3_medium": lambda: transformer(24, 192),
    "sd35_medium": lambda: transformer(
        24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))
    ),
    "sd35_large": lambda: transformer(38, 192, qk_norm="rms_norm"),
    "vae": lambda: diffusers.AutoencoderKL(**CONFIGS["vae"]),
    "clip_l": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**CONFIGS["clip_l"])
    ),
    "clip_g": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**CONFIGS["clip_g"])
    ),
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**CONFIGS["t5"])),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    """The component, its config, PyTorch's tensors by name, and our shapes."""
    with torch.device("meta"):
        theirs = MODELS[request.param]()
    name = request.param if request.param in components.COMPONENTS else "denoiser"
    component = components.COMPONENTS[name]
    config = getattr(theirs.config, "to_dict", lambda: dict(theirs.config))()
    module = component.build(config, jnp.bfloat16)
    mesh = sharding.make_mesh(fsdp=2, data=4)
    ours = components.abstract(component, module, config, mesh, "bfloat16")
    return request.param, component, module, config, theirs.state_dict(), ours


def shapes_of(component, module, ours, layout):
    pieces = key_mapping.pieces(ours, component.table(module), layout)
    keys = [piece.key for piece in pieces if piece.key is not None]
    assert len(keys) == len(set(keys))
    return {p.key: torch.Size(p.file_shape) for p in pieces if p.key is not None}


def test_the_diffusers_layout_is_ours_one_to_one(model):
    name, component, module, _, theirs, ours = model
    wanted = {
        k: v.shape for k, v in theirs.items() if not k.endswith(text_keys.IGNORED)
    }
    assert shapes_of(component, module, ours, "diffusers") == wanted
    assert sum(x.size for x in jax.tree.leaves(ours["params"])) == COUNTS[name]


def test_the_original_layout_by_the_way_diffusers_reads_it(model):
    """Their converter, told our names and shapes, must find all that it wants."""
    name, component, module, config, theirs, ours = model
    original = shapes_of(component, module, ours, "original")
    tensors = {k: torch.empty(v, device="meta") for k, v in original.items()}
    if "transformer_blocks.0.norm1.linear.weight" in theirs:
        read = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers
        found = read({f"model.diffusion_model.{k}": v for k, v in tensors.items()})
    elif name == "vae":
        read = single_file_utils.convert_ldm_vae_checkpoint
        found = read({f"first_stage_model.{k}": v for k, v in tensors.items()}, config)
    else:  # transformers' own names, without CLIP-L's projection
        wanted = {
            k: v.shape for k, v in theirs.items() if not k.endswith(text_keys.IGNORED)
        }
        if name == "clip_l":
            del wanted["text_projection.weight"]
        assert original == wanted
        return
    size = lambda tensors: {k: v.numel() for k, v in tensors.items()}
    assert size(found) == size(theirs)


def test_the_config_is_read_off_a_single_files_shapes(model):
    _, component, module, _, _, ours = model
    original = shapes_of(component, module, ours, "original")
    tensors = {k: torch.empty(v, device="meta") for k, v in original.items()}
    assert component.mark in tensors
    found = components.configured(component, None, tensors, "original")
    assert component.build(found, jnp.bfloat16) == module


def test_what_people_call_it(model):
    name, _, _, config, _, _ = model
    called = {
        "sd3_medium": "SD3-medium: depth 24",
        "sd35_medium": "SD3.5-medium: depth 24",
        "sd35_large": "SD3.5-large or -turbo: depth 38",
    }
    if name in called:
        assert components.released_name(config).startswith(called[name])


CONTROL_NETS = {
    "joint": dict(num_layers=12, num_attention_heads=24, caption_projection_dim=1536),
    "of SD3.5-medium": dict(
        num_layers=12,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        qk_norm="rms_norm",
        dual_attention_layers=tuple(range(12)),
    ),
    "single-stream": dict(
        num_layers=19,
        num_attention_heads=38,
        joint_attention_dim=None,
        caption_projection_dim=2048,
        pos_embed_max_size=None,
        pos_embed_type=None,
        use_pos_embed=False,
        force_zeros_for_pooled_projection=False,
    ),
}


@pytest.mark.parametrize("kind", CONTROL_NETS)
def test_control_nets_are_ours_one_to_one(kind):
    options = {"pos_embed_max_size": 192} | CONTROL_NETS[kind]
    with torch.device("meta"):
        theirs = diffusers.SD3ControlNetModel(**options)
    component, config = components.CONTROLNET, dict(theirs.config)
    module = component.build(config, jnp.bfloat16)
    mesh = sharding.make_mesh(fsdp=2, data=4)
    ours = components.abstract(component, module, config, mesh, "bfloat16")
    if module.borrowed:
        del ours["buffers"], ours["params"]["patch_embed"]
    found = shapes_of(component, module, ours, "diffusers")
    assert found == {k: v.shape for k, v in theirs.state_dict().items()}
    tensors = {k: torch.empty(v, device="meta") for k, v in found.items()}
    read = components.configured(component, None, tensors)
    assert component.build(read, jnp.bfloat16) == module
