"""Published configurations: every field is honoured or refused, in one line."""

import dataclasses
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from sd3_jax.distributed import sharding
from sd3_jax.errors import MISTAKE, UserError, exit_code
from sd3_jax.weights import (
    clip_keys,
    components,
    inferred_sizes,
    key_mapping,
    published_configs,
    safetensors,
    sources,
)
from sd3_jax.weights.safetensors import Entry

# As the published folders have them.
DENOISER = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.31.0.dev0",
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "dual_attention_layers": list(range(13)),
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 24,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_name_or_path": "../sdxl-vae/",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
CLIP = {
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "vocab_size": 49408,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": 32128,
}
SINGLE = {  # Stability's ControlNets of SD3.5-large
    "_class_name": "SD3ControlNetModel",
    "attention_head_dim": 64,
    "caption_projection_dim": 2048,
    "dual_attention_layers": [],
    "extra_conditioning_channels": 0,
    "force_zeros_for_pooled_projection": False,
    "in_channels": 16,
    "joint_attention_dim": None,
    "num_attention_heads": 38,
    "num_layers": 19,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": None,
    "pos_embed_type": None,
    "qk_norm": None,
    "sample_size": 128,
    "use_pos_embed": False,
}
JOINT = {k: DENOISER[k] for k in DENOISER if k not in ("_class_name", "qk_norm")}
JOINT |= {"_class_name": "SD3ControlNetModel", "num_layers": 6}
JOINT |= {"dual_attention_layers": []}
VISION = {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 14}
PUBLISHED = {
    "denoiser": DENOISER,
    "vae": VAE,
    "clip_l": CLIP,
    "clip_g": CLIP | {"hidden_act": "gelu"},
    "t5": T5,
    "controlnet": SINGLE,
    "clip_text": CLIP,
    "clip_vision": VISION,
}
CLASSES = {
    "denoiser": diffusers.SD3Transformer2DModel,
    "vae": diffusers.AutoencoderKL,
    "controlnet": diffusers.SD3ControlNetModel,
    "clip_l": transformers.CLIPTextConfig,
    "clip_text": transformers.CLIPTextConfig,
    "clip_vision": transformers.CLIPVisionConfig,
    "t5": transformers.T5Config,
}
HELD = {"feed_forward_proj", "max_position_embeddings"}  # to another than the default


def fields_of(kind):
    """The library's fields and their defaults."""
    found = CLASSES[kind]
    if dataclasses.is_dataclass(found):
        return {f.name: f.default for f in dataclasses.fields(found)}
    fields = dict(inspect.signature(found.__init__).parameters)
    return {name: p.default for name, p in fields.items() if name != "self"}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_configurations_are_read(kind):
    config = PUBLISHED[kind]
    found = published_configs.read(kind, config)
    assert found | config == found and published_configs.unknown(kind, config) == []
    assert published_configs.read(kind, found) == found
    assert published_configs.read(kind, json.loads(json.dumps(found))) == found


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_the_libraries_is_known(kind):
    """And what a file lacks is as the library that wrote it has it."""
    table = published_configs.TABLES[kind]
    for name, default in fields_of(kind).items():
        assert name in table, f"{kind}: {name} is neither honoured nor refused"
        if table[name] is not None and name not in HELD:
            known = table[name].default
            assert known == default and type(known) is type(default), name


@pytest.mark.parametrize("kind", CLASSES)
def test_a_class_writes_nothing_that_is_refused(kind):
    """Each class's own file, of sizes that are allowed here."""
    less = {"vae": {"use_quant_conv": False, "use_post_quant_conv": False}}
    less["t5"] = {"feed_forward_proj": "gated-gelu"}
    options = less.get(kind, {})
    if dataclasses.is_dataclass(CLASSES[kind]):
        config = CLASSES[kind](**options).to_dict()
    else:
        defaults = {k: v for k, v in fields_of(kind).items()}
        config = defaults | options | {"_class_name": CLASSES[kind].__name__}
    published_configs.read(kind, config)
    assert published_configs.unknown(kind, config) == []


INTEGERS = [True, 1.5, 24.0, "24", None, [24], {}, 0, -1, 10**9, 10**30]
WRONG = [
    *(("denoiser", "num_layers", x) for x in INTEGERS),
    *(("denoiser", "joint_attention_dim", x) for x in (10**30, 0, "4096", None)),
    *(("denoiser", "pos_embed_max_size", x) for x in (1.5, None, 10**6)),
    *(("denoiser", "patch_size", x) for x in (0, "two", 10**4)),
    *(("denoiser", "in_channels", x) for x in (4, 0, False)),
    ("denoiser", "out_channels", 32),
    ("denoiser", "sample_size", [128, 128]),
    ("denoiser", "pooled_projection_dim", float("nan")),
    ("denoiser", "attention_head_dim", 63),
    ("denoiser", "attention_head_dim", 2**16),
    ("denoiser", "num_attention_heads", 23),
    ("denoiser", "caption_projection_dim", 1152),
    *(("denoiser", "qk_norm", x) for x in ("layer_norm", "", False, "\x1b[2J\n")),
    *(
        ("denoiser", "dual_attention_layers", x)
        for x in (3, "0", [1], [0, 0], [0, 2], [True], [0.0], list(range(24)))
    ),
    ("denoiser", "dual_attention_layers", list(range(5000))),
    ("denoiser", "_class_name", "FluxTransformer2DModel"),
    ("denoiser", "_class_name", ["a", {}]),
    ("denoiser", "quantization_config", {"quant_method": "torchao"}),
    *(("vae", "scaling_factor", x) for x in ("abc", 0, -1.0, True, None, [1.5])),
    *(("vae", "scaling_factor", x) for x in (float("nan"), float("inf"), 1e-300)),
    *(("vae", "shift_factor", x) for x in ("abc", float("nan"), 1e300, False)),
    *(("vae", "block_out_channels", x) for x in (128, "128", [], [128, 2.0], [48] * 4)),
    ("vae", "block_out_channels", [32] * 9),
    ("vae", "block_out_channels", [128, 256]),
    ("vae", "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
    ("vae", "down_block_types", ["DownEncoderBlock2D"] * 3),
    ("vae", "up_block_types", None),
    ("vae", "act_fn", "relu"),
    ("vae", "in_channels", 4),
    ("vae", "out_channels", 1),
    ("vae", "use_quant_conv", True),
    ("vae", "use_post_quant_conv", 0),
    ("vae", "mid_block_add_attention", 1),
    ("vae", "norm_num_groups", 24),
    ("vae", "latents_mean", [0.0] * 16),
    ("vae", "latents_std", [1.0] * 16),
    ("vae", "_class_name", "AutoencoderTiny"),
    *(("clip_l", "num_hidden_layers", x) for x in (10**9, 1, "12", None)),
    *(("clip_l", "hidden_act", x) for x in ("gelu_new", "relu", None, ["gelu"])),
    ("clip_l", "layer_norm_eps", 1e-6),
    ("clip_l", "num_attention_heads", 11),
    ("clip_l", "max_position_embeddings", 64),
    ("clip_l", "projection_dim", None),
    *(("clip_l", "eos_token_id", x) for x in ([2], None, 49408, -1)),
    ("clip_l", "is_decoder", True),
    ("clip_l", "pruned_heads", {"0": [1]}),
    ("clip_l", "model_type", "siglip_text_model"),
    *(("t5", "num_layers", x) for x in (10**9, None)),
    *(("t5", "feed_forward_proj", x) for x in ("gelu", "relu", "gated-silu", None)),
    ("t5", "relative_attention_num_buckets", 64),
    ("t5", "relative_attention_max_distance", 256),
    ("t5", "layer_norm_epsilon", 1e-5),
    ("t5", "dense_act_fn", "relu"),
    ("t5", "is_gated_act", False),
    ("t5", "model_type", "umt5"),
    ("t5", "d_kv", 2**15),
    ("controlnet", "use_pos_embed", True),
    ("controlnet", "pos_embed_type", "rope"),
    ("controlnet", "joint_attention_dim", 4096),
    ("controlnet", "extra_conditioning_channels", -12),
    ("controlnet", "force_zeros_for_pooled_projection", None),
    ("controlnet", "num_layers", 10**9),
    ("clip_vision", "num_channels", 4),
    ("clip_vision", "image_size", [224, 224]),
    ("clip_vision", "patch_size", 15),
    ("clip_vision", "hidden_act", "silu"),
]
# Where a rule joins two fields, the other may be the one that is named.
PARTNERS = {
    "attention_head_dim": "caption_projection_dim",
    "num_attention_heads": "caption_projection_dim",
    "in_channels": "out_channels",
    "norm_num_groups": "block_out_channels",
    "patch_size": "image_size",
    "joint_attention_dim": "caption_projection_dim",
    "block_out_channels": "down_block_types",
}


@pytest.mark.parametrize("kind, name, value", WRONG, ids=lambda x: repr(x)[:40])
def test_a_wrong_field_is_named_in_one_line(kind, name, value):
    with pytest.raises(UserError) as error:
        published_configs.read(kind, PUBLISHED[kind] | {name: value}, "x/config.json")
    message = str(error.value)
    named = f"x/config.json: {name} = ", f"x/config.json: {PARTNERS.get(name)} = "
    assert message.startswith(named), message
    assert "expected" in message and message.isprintable() and len(message) < 300
    assert exit_code(error.value) == MISTAKE


@pytest.mark.parametrize("change", [{"use_pos_embed": False}, {"pos_embed_type": None}])
def test_a_joint_control_net_has_positions(change):
    published_configs.read("controlnet", JOINT)
    with pytest.raises(UserError, match=next(iter(change))):
        published_configs.read("controlnet", JOINT | change)
    with pytest.raises(UserError, match="pos_embed_max_size = null"):
        published_configs.read("controlnet", JOINT | {"pos_embed_max_size": None})


@pytest.mark.parametrize("config", [[], "a", None, 3])
def test_a_configuration_that_is_none(config):
    with pytest.raises(UserError, match="vae: .*expected a JSON object"):
        published_configs.read("vae", config)


def test_what_a_file_lacks_is_told():
    words = (
        r"use_quant_conv = true \(the default of a file without it\): expected false"
    )
    with pytest.raises(UserError, match=words):
        published_configs.read(
            "vae", {k: v for k, v in VAE.items() if k != "use_quant_conv"}
        )


def test_fields_that_nothing_reads_are_told_of(caplog):
    config = DENOISER | {"_note": 1, "use_magic": True}
    components.configured(components.COMPONENTS["denoiser"], config, where="a/b")
    assert caplog.messages == ["a/b: ignored fields: use_magic"]


def test_old_files_of_a_whole_clip(monkeypatch):
    """text_config_dict overrules text_config, in transformers as here."""
    text = CLIP | {"hidden_size": 512, "num_attention_heads": 8}
    whole = {"text_config": CLIP, "text_config_dict": text, "projection_dim": 512}
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(whole)))
    ours = clip_keys.towers(whole)
    for name in "hidden_size", "num_attention_heads", "num_hidden_layers":
        assert ours["text"][name] == getattr(theirs.text_config, name)
        assert ours["vision"][name] == getattr(theirs.vision_config, name)
    with pytest.raises(UserError, match=r"vision_config: \[\]: expected a JSON object"):
        clip_keys.towers({"vision_config": []})


# Against tensors

TINY = {
    "denoiser": DENOISER
    | dict(num_layers=3, num_attention_heads=1, caption_projection_dim=64)
    | dict(joint_attention_dim=48, pooled_projection_dim=40, pos_embed_max_size=6)
    | dict(dual_attention_layers=[0]),
    "vae": VAE
    | dict(block_out_channels=[32, 64], layers_per_block=1)
    | {f"{way}_block_types": VAE[f"{way}_block_types"][:2] for way in ("down", "up")},
    "clip_g": CLIP
    | dict(vocab_size=300, hidden_size=64, intermediate_size=96, projection_dim=64)
    | dict(num_hidden_layers=2, num_attention_heads=1, hidden_act="gelu"),
    "t5": T5
    | dict(vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_heads=2)
    | dict(num_layers=2),
    "controlnet": JOINT
    | dict(num_layers=2, num_attention_heads=1, caption_projection_dim=64)
    | dict(joint_attention_dim=48, pooled_projection_dim=40, pos_embed_max_size=6),
}
PARTS = components.COMPONENTS | {"controlnet": components.CONTROLNET}
_tensors = {}


def tensors(kind, layout):
    """Shapes of a tiny model's file."""
    if (kind, layout) not in _tensors:
        component, config = PARTS[kind], TINY[kind]
        module = component.build(config, jnp.float32)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        variables = components.abstract(component, module, config, mesh, "float32")
        pieces = key_mapping.pieces(variables, component.table(module), layout)
        _tensors[kind, layout] = {
            p.key: np.broadcast_to(np.float32(1), p.file_shape)
            for p in pieces
            if p.key is not None
        }
    return dict(_tensors[kind, layout])


@pytest.mark.parametrize("layout", key_mapping.LAYOUTS)
@pytest.mark.parametrize("kind", TINY)
def test_a_configuration_agrees_with_its_tensors(kind, layout):
    found = components.configured(
        PARTS[kind], TINY[kind], tensors(kind, layout), layout
    )
    assert found == published_configs.read(kind, TINY[kind])


@pytest.mark.parametrize("kind", TINY)
def test_a_single_file_tells_its_configuration(kind):
    layout = "diffusers" if kind == "controlnet" else "original"
    found = components.configured(PARTS[kind], None, tensors(kind, layout), layout)
    told = PARTS[kind].build(TINY[kind], jnp.float32)
    assert PARTS[kind].build(found, jnp.float32) == told


LIES = [
    *(("denoiser", "num_layers", n) for n in (2, 4, 1024)),
    ("denoiser", "joint_attention_dim", 4096),
    ("denoiser", "pooled_projection_dim", 41),
    ("denoiser", "pos_embed_max_size", 7),
    ("denoiser", "patch_size", 1),
    ("denoiser", "qk_norm", None),
    ("denoiser", "dual_attention_layers", []),
    ("denoiser", "dual_attention_layers", [0, 1]),
    ("vae", "layers_per_block", 2),
    ("vae", "latent_channels", 4),
    ("vae", "block_out_channels", [32, 32]),
    ("vae", "mid_block_add_attention", False),
    ("clip_g", "num_hidden_layers", 32),
    ("clip_g", "vocab_size", 49408),
    ("clip_g", "hidden_size", 1280),
    ("clip_g", "intermediate_size", 64),
    ("clip_g", "projection_dim", 96),
    ("t5", "num_layers", 24),
    ("t5", "vocab_size", 32128),
    ("t5", "d_model", 4096),
    ("t5", "d_ff", 64),
    ("t5", "num_heads", 4),
    ("t5", "d_kv", 64),
    ("controlnet", "num_layers", 6),
    ("controlnet", "joint_attention_dim", 4096),
    ("controlnet", "extra_conditioning_channels", 1),
    ("controlnet", "qk_norm", "rms_norm"),
]


@pytest.mark.parametrize("layout", key_mapping.LAYOUTS)
@pytest.mark.parametrize("kind, name, value", LIES, ids=lambda x: repr(x)[:40])
def test_a_configuration_that_lies_of_its_tensors(kind, name, value, layout):
    config = TINY[kind] | {name: value}
    with pytest.raises(UserError) as error:
        components.configured(PARTS[kind], config, tensors(kind, layout), layout, "a")
    message = str(error.value)
    assert message.startswith("a: ") and name in message.split(": expected")[0], message
    assert ", because " in message and message.isprintable()


def test_layers_are_as_many_as_there_are():
    x = tensors("denoiser", "original")
    x["joint_blocks.999999999.x_block.attn.qkv.weight"] = np.zeros(3)
    words = "a: joint_blocks.3 is missing, but joint_blocks.999999999 exists"
    with pytest.raises(UserError, match=words):
        inferred_sizes.detect("denoiser", x, "a")
    x = tensors("denoiser", "original") | {"joint_blocks.x.a": np.zeros(3)}
    x[f"joint_blocks.{10**40}.a"] = np.zeros(3)  # no layer of anything: it is extra
    assert inferred_sizes.detect("denoiser", x)["num_layers"] == 3
    for kind, name in (
        ("clip_g", "text_model.encoder.layers.88.a"),
        ("t5", "encoder.block.88.a"),
        ("vae", "encoder.down.88.a"),
        ("vae", "encoder.down.0.block.88.a"),
        ("controlnet", "controlnet_blocks.88.a"),
    ):
        x = tensors(kind, "diffusers" if kind == "controlnet" else "original")
        with pytest.raises(UserError, match="is missing, but .*88 exists"):
            inferred_sizes.detect(kind, x | {name: np.zeros(3)})


@pytest.mark.parametrize("kind", TINY)
def test_any_shape_is_answered(kind):
    """Each tensor that is looked at, missing or of any other shape."""
    layout = "diffusers" if kind == "controlnet" else "original"
    whole = tensors(kind, layout)
    looked = {
        size.tensor for size in inferred_sizes.sizes_of(kind, layout)
    } & whole.keys()
    looked |= {k for k in whole if k.endswith(".0.block.0.conv1.weight")}
    assert len(looked) > 1
    for name in looked:
        for shape in None, (), (3,), (0, 0), (0,) * 4, (7, 5), (1, 10, 64), (8,) * 4:
            x = {k: v for k, v in whole.items() if k != name}
            if shape is not None:
                x[name] = np.broadcast_to(np.float32(1), shape)
            try:
                config = components.configured(PARTS[kind], None, x, layout, "a")
                PARTS[kind].build(config, jnp.float32)
            except UserError as error:
                assert str(error).startswith("a: ") and str(error).isprintable()


def entries(x):
    return {k: Entry(v.dtype, v.shape, lambda v=v: v) for k, v in x.items()}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_layers": 10**9}, "num_layers = 1000000000: expected a whole number"),
        ({"num_layers": 900}, "num_layers = 900: expected 3, because the file has tr"),
        ({"joint_attention_dim": 10**30}, "joint_attention_dim = 1000"),
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name"),
    ],
)
def test_a_folder_is_refused_before_anything_is_traced(tmp_path, change, words):
    (tmp_path / "transformer").mkdir()
    index = {"transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "transformer" / "config.json"
    file.write_text(json.dumps(TINY["denoiser"] | change))
    found = entries(tensors("denoiser", "diffusers"))
    safetensors.write_file(tmp_path / "transformer" / "a.safetensors", found)
    with pytest.raises(UserError, match=words) as error:
        sources.parts(sources.epath.Path(tmp_path))
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_a_single_file_is_refused_by_its_name(tmp_path):
    x = tensors("denoiser", "original")
    x["joint_blocks.99999.context_block.attn.qkv.weight"] = np.zeros(3, np.float32)
    path = tmp_path / "model.safetensors"
    safetensors.write_file(path, entries(x))
    with pytest.raises(UserError, match=f"{path}: denoiser: joint_blocks.3 is missing"):
        sources.parts(sources.epath.Path(path))
    told = {"denoiser": DENOISER}  # ours tells its configuration, of another model here
    found = entries(tensors("denoiser", "original"))
    safetensors.write_file(path, found, {"sd3_jax": json.dumps(told)})
    with pytest.raises(UserError, match=f"{path}: denoiser: num_attention_heads x"):
        sources.parts(sources.epath.Path(path))
