"""Every tensor of a single file is used, known to be unread, or an error.

Shapes alone are planned here, as other tools name them; tests/parity has the values.
"""

import functools
import itertools
import json
import logging

import jax
import numpy as np
import pytest
from etils import epath

from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.weights import (
    components,
    key_mapping,
    sharded_load,
    single_file,
    sources,
    text_keys,
)
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.encoder_configs import CONFIGS
from sd3_jax.weights.safetensors import Tensor

PATH = epath.Path("model.safetensors")
CLIP = dict(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    projection_dim=64,
    layer_norm_eps=1e-5,
)
SMALL = {
    "denoiser": dict(
        num_layers=3,
        num_attention_heads=1,
        attention_head_dim=64,
        caption_projection_dim=64,
        joint_attention_dim=96,
        pooled_projection_dim=128,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
        dual_attention_layers=[0],
    ),
    "vae": CONFIGS["vae"]
    | dict(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        layers_per_block=1,
    ),
    "clip_l": CONFIGS["clip_l"] | CLIP,
    "clip_g": CONFIGS["clip_g"] | CLIP,
    "t5": CONFIGS["t5"]
    | dict(vocab_size=60, d_model=96, d_kv=64, d_ff=100, num_layers=2, num_heads=1),
}


@functools.cache
def shapes_of(name, config):
    """The module and its variables' shapes, of a configuration as JSON."""
    component, config = COMPONENTS[name], json.loads(config)
    module = component.build(config, np.dtype("float32"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return module, components.abstract(component, module, config, mesh, "float32")


def tensors_of(name, layout="original", table=None, config=None):
    """Those of one component's file, without a byte behind them."""
    module, shapes = shapes_of(name, json.dumps(config or SMALL[name]))
    table = table or COMPONENTS[name].table
    return {
        piece.key: Tensor(PATH, np.dtype("float16"), piece.file_shape, 0)
        for piece in key_mapping.pieces(shapes, table(module), layout)
        if piece.key is not None
    }


def tensor(*shape, dtype="float16"):
    return Tensor(PATH, np.dtype(dtype), shape, 0)


@pytest.fixture(scope="module")
def published():
    """A file with all components, as Stability publishes it."""
    return {
        component.prefix + key: x
        for name, component in COMPONENTS.items()
        for key, x in tensors_of(name).items()
    }


@pytest.fixture(scope="module", autouse=True)
def quick_pieces():
    """The pieces of a table and shapes are made once, not for each of 500 files."""
    make, known = key_mapping.pieces, {}

    def pieces(shapes, groups, layout):
        rows = [(g.original, [r.names(layout) for r in g.rows]) for g in groups]
        key = id(shapes), layout, str(rows)
        if key not in known:
            known[key] = make(shapes, groups, layout), shapes
        return known[key][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_mapping, "pieces", pieces)
        yield


def planned(tensors, metadata=None):
    """What a file would be loaded as: the tensors that are read, by component."""
    read = {}
    for name, part in sources._single(PATH, tensors, metadata or {}).items():
        if part.read is not None:
            module, shapes = shapes_of(name, json.dumps(part.config))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(
                    sharded_load,
                    "load",
                    lambda tensors, _, pieces: [
                        id(tensors[p.key]) for p in pieces if p.key is not None
                    ],
                )
                read[name] = part.read(COMPONENTS[name], module, shapes)
    return read


def test_every_tensor_of_a_published_file_is_read(published):
    read = planned(published)
    assert list(read) == list(COMPONENTS)
    ids = [x for part in read.values() for x in part]
    assert sorted(ids) == sorted(map(id, published.values()))


def refused(tensors, metadata=None) -> str:
    with pytest.raises(UserError) as caught:
        planned(tensors, metadata)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500
    return str(caught.value)


@pytest.fixture(params=COMPONENTS)
def part(request, published):
    """One component of the file, below its prefix."""
    prefix = COMPONENTS[request.param].prefix
    return {k: x for k, x in published.items() if k.startswith(prefix)}


def test_no_tensor_can_be_taken_away(part):
    for key in part:
        told = refused({k: x for k, x in part.items() if k != key})
        assert str(PATH) in told


def test_no_tensor_can_be_taken_away_from_a_whole_file(published):
    for key in list(published)[::40]:
        refused({k: x for k, x in published.items() if k != key})


RENAMED = {
    "its end": lambda key: key + "x",
    "its kind": lambda key: key.rpartition(".")[0] + ".kernel",
    "its start": lambda key: "old." + key,
    "a part of its start": lambda key: key.replace(".", "_", 1),
    "as an average": lambda key: "model_ema." + key,
    "as another's": lambda key: "first_stage_model.x." + key,
    "as the scale of CLIP": lambda key: key + ".logit_scale",
}


def test_no_tensor_can_be_renamed(part):
    for key, change in zip(part, itertools.cycle(RENAMED.values())):
        name = change(key)
        refused({(name if k == key else k): x for k, x in part.items()})


@pytest.mark.parametrize("how", RENAMED)
def test_no_tensor_of_a_whole_file_can_be_renamed(how, published):
    for key in list(published)[::60]:
        name = RENAMED[how](key)
        refused({(name if k == key else k): x for k, x in published.items()})


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("to", ["other.", "model_ema.", "", "text_encoders.", "x"])
def test_no_component_can_be_renamed(name, to, published):
    """Unless its new name is one that other tools give it."""
    prefix = COMPONENTS[name].prefix
    renamed = {
        (to + k.removeprefix(prefix) if k.startswith(prefix) else k): x
        for k, x in published.items()
    }
    if to == "" and name in ("denoiser", "vae", "t5"):
        assert planned(renamed) == planned(published)
    else:
        refused(renamed)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_can_be_absent_and_that_is_told(name, published, caplog):
    caplog.set_level(logging.INFO)
    prefix = COMPONENTS[name].prefix
    rest = {k: x for k, x in published.items() if not k.startswith(prefix)}
    assert set(planned(rest)) == set(COMPONENTS) - {name}
    assert f"; no {name}" in caplog.text
    planned(rest, {"sd3_jax": json.dumps({"t5": SMALL["t5"], name: SMALL[name]})})
    assert f"{name}, which it lists, no longer exists" in caplog.text


def test_what_only_our_files_hold_is_missed(published):
    """CLIP-L's projection, which a published file leaves out, is in those of ours."""
    key = COMPONENTS["clip_l"].prefix + text_keys.PROJECTION
    ours = published | {key: tensor(64, 64)}
    metadata = {"sd3_jax": json.dumps(SMALL), sources.FULLER: "clip_l"}
    assert id(ours[key]) in planned(ours, metadata)["clip_l"]
    assert "clip_l: 1 missing" in refused(published, metadata)
    old = {"sd3_jax": metadata["sd3_jax"]}  # before there was that entry
    assert id(ours[key]) in planned(ours, old)["clip_l"]
    assert id(ours[key]) not in planned(ours)["clip_l"]


# Names that other tools write


def renamed(old, new):
    return lambda file: {k.replace(old, new): x for k, x in file.items()}


def beside(**shapes):
    extra = {k.replace("__", "."): tensor(*shape) for k, shape in shapes.items()}
    return lambda file: file | extra


def with_keys(*keys):
    return lambda file: file | {key: tensor(3) for key in keys}


L, G, T = (COMPONENTS[name].prefix for name in ("clip_l", "clip_g", "t5"))
WRITTEN = {
    "ComfyUI's diffusion model": renamed("model.diffusion_model.", "diffusion_model."),
    "a bare denoiser": renamed("model.diffusion_model.", ""),
    "a model without a wrapper": renamed("model.diffusion_model.", "model."),
    "vae.": renamed("first_stage_model.", "vae."),
    "encoders without transformer.": lambda file: {
        k.replace(".transformer.", ".") if k.startswith("text_encoders.") else k: x
        for k, x in file.items()
    },
    "encoders alone": renamed("text_encoders.", ""),
    "diffusers' folders": lambda file: {
        k.replace(L, "text_encoder.")
        .replace(G, "text_encoder_2.")
        .replace(T, "text_encoder_3."): x
        for k, x in file.items()
    },
    "ComfyUI's scales": with_keys(
        "text_encoders.clip_l.logit_scale",
        "text_encoders.clip_g.logit_scale",
        "text_encoders.t5xxl.logit_scale",
    ),
    "ComfyUI's projection": with_keys("text_encoders.clip_l.text_projection"),
    "CLIP-L's projection": with_keys(L + "text_projection.weight"),
    "transformers' numbers": with_keys(
        L + "text_model.embeddings.position_ids",
        G + "text_model.embeddings.position_ids",
    ),
    "T5's embedding twice": with_keys(T + "encoder.embed_tokens.weight"),
    "T5's other name": renamed(T + "shared.weight", T + "encoder.embed_tokens.weight"),
    "T5's decoder": with_keys(T + "decoder.block.0.layer.0.x.weight", T + "lm_head.w"),
    "an average": with_keys(
        "model_ema.diffusion_modeljoint_blocks0", "model_ema.decay"
    ),
    "noise levels": with_keys("denoiser.sigmas", "model.model_sampling.sigmas"),
    "model_sampling": with_keys("model_sampling.sigmas"),
    "a schedule": with_keys(
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_recipm1_alphas_cumprod", "log_one_minus_alphas_cumprod"),
        *("posterior_variance", "posterior_mean_coef1", "model.alphas_cumprod"),
    ),
    "an image tower": with_keys(L + "vision_model.x", L + "visual_projection.weight"),
    "a discriminator": with_keys("first_stage_model.loss.logvar"),
}


@pytest.mark.parametrize("tool", WRITTEN)
def test_files_of_other_tools_are_read_whole(tool, published):
    assert planned(WRITTEN[tool](published)) == planned(published)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("layout", key_mapping.LAYOUTS)
def test_a_components_file_alone(name, layout):
    """Of diffusers' folders as well, which ComfyUI's users call unet or vae files."""
    file = tensors_of(name, layout, config=wide(name))
    if name == "clip_l":
        file.pop(text_keys.PROJECTION, None)
    read = planned(file)
    assert list(read) == [name]
    assert sorted(read[name]) == sorted(map(id, file.values()))


def wide(name):
    """A bare CLIP is known by its width, so it has the one that it is known by."""
    if name not in single_file.CLIPS:
        return None
    width = CONFIGS[name]["hidden_size"]
    return SMALL[name] | dict(
        hidden_size=width, num_attention_heads=width // 64, projection_dim=width
    )


@pytest.mark.parametrize("name", single_file.CLIPS)
def test_the_width_says_which_clip_it_is_not_the_files_name(name, tmp_path):
    path = epath.Path(tmp_path / "clip_g_clip_l_bigg.safetensors")
    file = tensors_of(name, config=wide(name)) | {"logit_scale": tensor()}
    assert list(single_file.split(path, file)) == [name]
    other = {"clip_l": G, "clip_g": L}[name]
    file = {other + key: x for key, x in file.items()}
    assert f"the width of {name}" in refused(file)


def test_a_clip_of_another_width_is_asked_for_its_prefix():
    told = refused(tensors_of("clip_g"))
    assert (
        "a CLIP of width 64: expected 768 (CLIP-L) or 1280 (CLIP-G), or names" in told
    )
    file = {f"clip_g.{key}": x for key, x in tensors_of("clip_g").items()}
    assert list(planned(file)) == ["clip_g"]


@pytest.mark.parametrize("prefix", ["", "text_encoders.clip_g."])
def test_clip_in_open_clips_layout(prefix):
    names_ = tensors_of(
        "clip_g", table=text_keys.open_clip_table, config=wide("clip_g")
    )
    assert "transformer.resblocks.1.attn.in_proj_weight" in names_
    file = {prefix + key: x for key, x in names_.items()}
    read = planned(file | {prefix + "logit_scale": tensor(), "visual.proj": tensor(3)})
    assert sorted(read["clip_g"]) == sorted(map(id, file.values()))
    for key in file:
        refused({k: x for k, x in file.items() if k != key})
    table = functools.partial(text_keys.open_clip_table, projected=False)
    small = tensors_of("clip_l", table=table, config=wide("clip_l"))
    assert list(planned(small | {"text_projection": tensor(768, 768)})) == ["clip_l"]


# What is refused, by name


def test_unknown_tensors_are_named_ten_at_most_and_counted(published):
    told = refused(published | {f"odd.{i}": tensor(2) for i in range(25)})
    assert "25 tensors belong to no known part: odd.0, odd.1" in told
    assert "odd.9 and 15 more" in told and "odd.10" not in told
    assert "model.diffusion_model., first_stage_model., text_enc" in told


def test_a_tensor_by_two_prefixes(published):
    key = "joint_blocks.0.x_block.attn.qkv.weight"
    told = refused(published | {key: tensor(192, 64)})
    assert f"its part has {key} twice, under two prefixes" in told


def test_integers_are_no_weights(published):
    key = "model.diffusion_model.joint_blocks.1.x_block.attn.qkv.weight"
    for dtype in ("int8", "uint8", "int32", "bool"):
        file = published | {key: published[key]._replace(dtype=np.dtype(dtype))}
        told = refused(file)
        assert f"x_block.attn.qkv.weight is of {dtype}, expected floats" in told
    assert planned(published | {L + "position_ids": tensor(7, dtype="int64")})


OTHERS = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": "a LoRA; load it",
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "a LoRA; load it",
    "controlnet_blocks.0.weight": "a ControlNet; use sd3_jax.load_control",
    "model.diffusion_model.input_blocks.0.0.weight": "but a U-Net",
    "down_blocks.0.attentions.0.proj_in.weight": "but a U-Net",
    "double_blocks.0.img_attn.qkv.weight": "Flux, or one like it",
    "a.b": "not a model of this family; it holds a.b",
    "model_ema.diffusion_modeljoint_blocks0": "not a model of this family; it holds",
    "text_model.encoder.layers.0.mlp.fc1.weight": "part of a CLIP, without its token",
    "joint_blocks.0.x_block.attn.qkv.weight": "x_embedder.proj.weight is missing",
    "decoder.up_blocks.0.resnets.0.conv1.weight": "safetensors: vae",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "shared.weight is missing",
}


@pytest.mark.parametrize("key", OTHERS)
def test_other_models_are_called_by_their_names(key):
    assert OTHERS[key] in refused({key: tensor(4, 4)})
