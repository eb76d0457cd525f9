"""Each tool's names of layers, with each kind of tensors, against diffusers' names."""

import json
import time

import jax
import numpy as np
import pytest
import torch
from weights import adapter_models as models

from sd3_jax.errors import UserError
from sd3_jax.params.adapters import Factors
from sd3_jax.weights import adapter_files

D = 64
# Names of a layer in diffusers' and in the original layout, its outputs and inputs.
# ComfyUI's utils.mmdit_to_diffusers and OneTrainer's convert_sd3_lora.py have the same.
LAYERS = [
    ("transformer_blocks.0.attn.to_out.0", "joint_blocks.0.x_block.attn.proj", D, D),
    ("transformer_blocks.1.ff.net.0.proj", "joint_blocks.1.x_block.mlp.fc1", 4 * D, D),
    ("transformer_blocks.2.attn.to_add_out", "joint_blocks.2.context_block.attn.proj")
    + (D, D),
    ("transformer_blocks.0.attn2.to_out.0", "joint_blocks.0.x_block.attn2.proj", D, D),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0", D, 128),
]
KINDS = {
    "lora": lambda out, inputs: {
        "lora_up.weight": (out, 3),
        "lora_down.weight": (3, inputs),
    },
    "dora": lambda out, inputs: {
        "lora_up.weight": (out, 3),
        "lora_down.weight": (3, inputs),
        "dora_scale": (out, 1),
    },
    "loha": lambda out, inputs: {
        **{f"hada_w{i}_a": (out, 3) for i in (1, 2)},
        **{f"hada_w{i}_b": (3, inputs) for i in (1, 2)},
    },
    "lokr": lambda out, inputs: {
        "lokr_w1": (4, 2),
        "lokr_w2_a": (out // 4, 3),
        "lokr_w2_b": (3, inputs // 2),
    },
    "diff": lambda out, inputs: {"diff": (out, inputs), "diff_b": (out,)},
}
flat = lambda name: name.replace(".", "_")
# A layer's whole name, from its names in both layouts.
NAMINGS = {
    # ComfyUI, comfy/lora.py: model_lora_keys_unet, of an SD3
    "comfyui": lambda split, fused: f"diffusion_model.{fused}",
    "comfyui-lycoris": lambda split, fused: f"lycoris_{flat(split)}",
    # sd-scripts, networks/lora_sd3.py: prefix + "." + name, dots replaced
    "kohya": lambda split, fused: f"lora_unet_{flat(fused)}",
    "kohya-split": lambda split, fused: f"lora_unet_{flat(split)}",
    # OneTrainer: legacy_diffusers, diffusers and omi of LoraConversionKeySet
    "onetrainer": lambda split, fused: f"lora_transformer_{flat(split)}",
    "onetrainer-dots": lambda split, fused: f"lora_transformer.{split}",
    "onetrainer-omi": lambda split, fused: f"transformer.{fused}",
    # lycoris/wrapper.py: LORA_PREFIX + "_" + name, dots replaced
    "lycoris": lambda split, fused: f"lycoris_{flat(split)}",
    "bare": lambda split, fused: split,
    "bare-original": lambda split, fused: fused,
    "wrapped": lambda split, fused: f"base_model.model.{split}",
}


def adapter(kind, named, layers=LAYERS):
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for *names, out, inputs in layers:
        shapes = KINDS[kind](out, inputs)
        stem = named(*names)
        for end, shape in shapes.items():
            tensors[f"{stem}.{end}"] = 0.2 * torch.randn(shape, generator=draw)
        if kind != "diff":
            tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_names_of_the_denoiser(naming, kind, tmp_path):
    same(kind, NAMINGS[naming], "denoiser", LAYERS, tmp_path)


def same(kind, named, name, layers, tmp_path):
    """The file changes what one of diffusers' names does."""
    folder = models.COMPONENTS[name].folder
    plain = adapter(kind, lambda split, *_: f"{folder}.{split}", layers)
    other = adapter(kind, named, layers)
    component = models.component(name)
    wanted = component.loaded(models.save(tmp_path / "a.safetensors", plain))
    changes = component.loaded(models.save(tmp_path / "b.safetensors", other))
    assert {path[-1] for path in changes} == ({"kernel", "bias"} & ENDS[kind])
    jax.tree.map(np.testing.assert_array_equal, dict(changes), dict(wanted))


ENDS = dict.fromkeys(KINDS, {"kernel"}) | {"diff": {"kernel", "bias"}}
CLIP = [
    ("text_model.encoder.layers.0.self_attn.q_proj", D, D),
    ("text_model.encoder.layers.2.mlp.fc2", D, 96),
]
T5 = [
    ("encoder.block.0.layer.0.SelfAttention.o", 160, 192),
    ("encoder.block.1.layer.1.DenseReluDense.wo", 160, 96),
]
TEXT = {  # prefixes, whether names are flat, by component
    "clip_l": [
        ("text_encoders.clip_l.transformer.", False),  # ComfyUI
        ("clip_l.transformer.", False),
        ("clip_l.", False),  # OneTrainer's omi
        ("lora_te1.", False),
        ("lora_te1_", True),  # kohya, OneTrainer
        ("base_model.model.", False),  # PEFT
        ("lycoris_", True),
    ],
    "clip_g": [
        ("text_encoders.clip_g.transformer.", False),
        ("clip_g.", False),
        ("lora_te2_", True),
    ],
    "t5": [
        ("text_encoders.t5xxl.transformer.", False),
        ("t5.", False),
        ("lora_te3.", False),
        ("lora_te3_", True),
        ("base_model.model.", False),
        ("lycoris_", True),
        ("", False),
    ],
}


def t5_layers():
    """T5's layers with the miniature's sizes."""
    state = models.component("t5").state
    return [(name, *state[f"{name}.weight"].shape) for name, *_ in T5]


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
@pytest.mark.parametrize(
    "name, prefix, is_flat", [(name, *x) for name, rows in TEXT.items() for x in rows]
)
def test_names_of_text_encoders(name, prefix, is_flat, kind, tmp_path):
    layers = t5_layers() if name == "t5" else CLIP
    named = lambda split: prefix + (flat(split) if is_flat else split)
    same(kind, named, name, layers, tmp_path)


def test_onetrainer_numbers_q_k_and_v(tmp_path):
    """convert_sd3_lora.py: x_block.attn.qkv.1 is attn.to_k, with its own factors."""
    numbers = [
        (f"transformer_blocks.{i}.{split.format(x)}", f"joint_blocks.{i}.{fused}.{j}")
        + (D, D)
        for i in range(2)
        for split, fused in (
            ("attn.to_{}", "x_block.attn.qkv"),
            ("attn2.to_{}", "x_block.attn2.qkv"),
            ("attn.add_{}_proj", "context_block.attn.qkv"),
        )
        for j, x in enumerate("qkv")
        if (i, j) != (1, 0)  # not all of them
    ]
    omi = NAMINGS["onetrainer-omi"]
    same("lora", omi, "denoiser", numbers, tmp_path)
    same("lokr", omi, "denoiser", numbers, tmp_path)


def test_the_fused_layer_and_its_parts_add_up(tmp_path):
    """Names of both layouts for one q: neither may overwrite the other."""
    fused = adapter("lora", lambda name: f"lora_unet_{name}", QKV)
    parts = adapter("lora", lambda name: f"lora_unet_{flat(name)}", [Q])
    component, merged = models.component("denoiser"), []
    for i, tensors in enumerate((fused, parts, fused | parts)):
        file = models.save(tmp_path / f"{i}.safetensors", tensors)
        merged.append(component.merged(file))
    add = lambda base, x, y: x + (y - base)
    wanted = jax.tree.map(add, component.params, *merged[:2])
    assert models.error(merged[2], wanted) < 1e-6


QKV = [("joint_blocks_0_x_block_attn_qkv", 3 * D, D)]
Q = ("transformer_blocks.0.attn.to_q", D, D)


def test_factors_of_a_fused_layer_repeat_a(tmp_path):
    tensors = adapter("lora", lambda name: f"lora_unet_{name}", QKV)
    file = models.save(tmp_path / "x.safetensors", tensors)
    (change,) = models.component("denoiser").loaded(file).values()
    assert isinstance(change, Factors)
    a = change.a[0]  # (in, 3, rank)
    np.testing.assert_array_equal(a[:, 0], a[:, 1])
    np.testing.assert_array_equal(a[:, 0], a[:, 2])


# --- what cannot be applied


def refused(tmp_path, tensors, *parts, name="denoiser", metadata=None):
    file = models.save(tmp_path / "x.safetensors", tensors, metadata)
    component = models.component(name)
    with pytest.raises(UserError) as caught:
        layers = adapter_files.read(file)
        adapter_files.load(layers[name], name, component.module, component.params)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    for text in parts:
        assert text in message, message
    return message


def lora(*layers, rank=2, out=D, inputs=D):
    return {
        f"{layer}.{end}": torch.ones(shape)
        for layer in layers
        for end, shape in (
            ("lora_A.weight", (rank, inputs)),
            ("lora_B.weight", (out, rank)),
        )
    }


def test_half_known_names_are_refused_with_count_and_ten_names(tmp_path):
    known = lora(*(f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(4)))
    unknown = {f"transformer.extra_{i:02}.weight": torch.ones(1) for i in range(12)}
    refused(
        tmp_path,
        known | unknown,
        "12 of its 20 tensors cannot be applied",
        "transformer.extra_00.weight (unknown",
        "extra_09.weight",
        "and 2 more",
    )


@pytest.mark.parametrize(
    "name, key",
    [
        ("clip_l", "lora_te1_text_model_encoder_layers_9_mlp_fc1"),
        ("clip_g", "lora_te2_text_model_encoder_layers_40_mlp_fc1"),
        ("t5", "lora_te3_encoder_block_7_layer_0_SelfAttention_q"),
        ("t5", "text_encoder_3.lm_head"),
        ("t5", "text_encoder_3.decoder.block.0.layer.0.SelfAttention.q"),
    ],
)
def test_layers_that_a_text_encoder_lacks(name, key, tmp_path):
    refused(tmp_path, lora(key), f"1 of 1 layers do not fit {name}: ", name=name)


def test_only_unknown_names_have_a_guess(tmp_path):
    unknown = refused(tmp_path, lora("transformer.transformer_blocks.0.attn.to_w"))
    assert 'did you mean "transformer_blocks.0.attn.to_' in unknown
    assert "did you mean" not in refused(tmp_path, lora(LAYER, inputs=96))


@pytest.mark.parametrize(
    "width, text", [(3072, ", as those of Flux,"), (96, ""), (2432, "SD3.5 Large")]
)
def test_a_file_of_another_width_says_so(width, text, tmp_path):
    tensors = lora(LAYER, inputs=width, out=width)
    hint = f"; its layers are {width} wide"
    refused(tmp_path, tensors, hint, text, "and the model's 64")


def test_names_of_peft_with_any_adapter_name(tmp_path):
    """PEFT takes any text without a dot as an adapter's name."""
    tensors = lora(f"base_model.model.{LAYER.removeprefix('transformer.')}")
    component = models.component("denoiser")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for name in "my-cat", "v1 (final)":
        named = {k.replace(".weight", f".{name}.weight"): x for k, x in tensors.items()}
        file = models.save(tmp_path / "adapter_model.safetensors", named)
        assert len(component.loaded(file)) == 1


def test_a_name_that_no_tool_writes(tmp_path):
    name = f"transformer.{'x' * 190}"
    refused(tmp_path, lora(name), "expected at most 200 characters")


@pytest.mark.parametrize(
    "pattern",
    [
        ".*" * 15 + "z",
        "a?" * 30 + "z",
        "}?" * 30 + "z",
        "(to|t)" * 30 + "z",
        r"\w{1,}" * 9 + "z",
        "(a+)+z",
        "[" + "a]+" * 9,
    ],
)
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_patterns_that_would_run_for_ever(field, pattern, tmp_path):
    config = {"transformer.r": 2, f"transformer.{field}": {pattern: 2}}
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    start = time.perf_counter()
    refused(tmp_path, lora(LAYER), "simplify it", metadata=metadata)
    assert time.perf_counter() - start < 1


def test_patterns_that_people_write(tmp_path):
    for pattern in r"transformer_blocks\.\d+\.attn\.(to_q|to_k)", ".*attn.*to_q":
        config = {"transformer.r": 2, "transformer.alpha_pattern": {pattern: 6}}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
        file = models.save(tmp_path / "x.safetensors", lora(LAYER), metadata)
        (update,) = adapter_files.read(file)["denoiser"].updates.values()
        assert update.scale == 3


def test_rows_of_textual_inversion_are_no_layer(tmp_path):
    component = models.component("clip_l")
    extended = component._replace(
        params=component.params | {"added_tokens": np.zeros((32, D), np.float32)}
    )
    (name, out, inputs) = CLIP[0]
    file = models.save(
        tmp_path / "x.safetensors",
        lora(f"text_encoder.{name}", out=out, inputs=inputs),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        dict(extended.loaded(file)),
        dict(component.loaded(file)),
    )


def test_layers_that_the_model_lacks_are_counted(tmp_path):
    layers = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(24)]
    refused(
        tmp_path,
        lora(*layers),
        "20 of 24 layers do not fit denoiser",
        "transformer_blocks.10.attn.to_q is not a layer of the model; transformer_b",
        "and 10 more",
        "the file has 24 blocks and the model 4",
    )


FOREIGN = {
    "Flux": "transformer.single_transformer_blocks.0.attn.to_q",
    "Flux ": "lora_unet_double_blocks_0_img_attn_qkv",
    "Stable Diffusion XL": "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9"
    "_attn1_to_q",
    "Stable Diffusion 1, 2 or XL": "unet.up_blocks.1.attentions.0.proj_in",
    "Stable Cascade": "lora_prior_unet_blocks_0_attn",
    "Wan or another video model": "diffusion_model.blocks.0.self_attn.q",
    "Qwen-Image": "transformer.transformer_blocks.0.img_mod.1",
    "AuraFlow": "transformer.joint_transformer_blocks.0.attn.to_q",
}


@pytest.mark.parametrize("model", FOREIGN)
def test_adapters_of_other_models_are_named(model, tmp_path):
    refused(tmp_path, lora(FOREIGN[model]), f"is an adapter of {model.strip()} (")


LAYER = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(
    "tensors, text",
    [
        (
            {k: x.to(torch.int8) for k, x in lora(LAYER).items()},
            "A is of int8; expected floats, it may be quantized",
        ),
        (lora(LAYER, inputs=96), "to_q.lora_A is [2, 96], expected [2, 64]"),
        (
            {f"{LAYER}.diff": torch.ones(D, 32)},
            "to_q.diff is [64, 32], expected [64, 64]",
        ),
        (
            {
                f"{LAYER}.lokr_w1": torch.ones(4, 4),
                f"{LAYER}.lokr_w2": torch.ones(4, 16),
            },
            "make 16 outputs and 1024 values, expected [64, 64]",
        ),
        (
            {
                f"{LAYER}.hada_w{i}_{x}": torch.ones(s)
                for i in (1, 2)
                for x, s in (("a", (D, 2)), ("b", (3, D)))
            },
            "hada_w1 is of [64, 64]",
        ),
        (
            lora(LAYER) | {f"{LAYER}.dora_scale": torch.ones(7)},
            "dora_scale is [7], expected [64, 1]",
        ),
        (
            {f"{LAYER}.diff": torch.full((D, D), torch.nan)},
            "values that are not finite in diff",
        ),
        (
            {"transformer.transformer_blocks.0.attn.norm_q.diff_b": torch.ones(D)},
            "norm_q has no bias in the model",
        ),
        (lora(LAYER) | {f"{LAYER}.weight": torch.ones(D, D)}, "1 of its 3 tensors"),
        (lora(LAYER) | {f"{LAYER}.a1.weight": torch.ones(1)}, "GLoRA is not supported"),
        (
            lora(LAYER) | {"bundle_emb.word.clip_l": torch.ones(1)},
            "an embedding is not supported",
        ),
        (
            {f"{LAYER}.diff": torch.ones(D, D), "lora_unet_x.diff": torch.ones(1)},
            "x is not a layer of the model",
        ),
        (
            lora(LAYER) | lora("lora_unet_transformer_blocks_0_attn_to_q"),
            "is the same layer as",
        ),
    ],
)
def test_tensors_that_do_not_fit(tensors, text, tmp_path):
    refused(tmp_path, tensors, text)


def of_layer(**shapes):
    """Ones of these shapes, by the role."""
    return {f"{LAYER}.{role}": torch.ones(shape) for role, shape in shapes.items()}


LOKR = dict(lokr_w1=(4, 4), lokr_w2=(16, 16))
LOHA = dict(hada_w1_a=(D, 2), hada_w1_b=(2, D), hada_w2_a=(D, 2), hada_w2_b=(2, D))
ONES = lora(LAYER)


@pytest.mark.parametrize(
    "tensors, text",
    [
        (of_layer(**LOKR, lokr_t2=(2, 2, 1, 1)), "lokr_t2 beside lokr_w1, lokr_w2"),
        (of_layer(**LOKR, lokr_w2_a=(16, 2)), "has lokr_w2_a beside"),
        (of_layer(**LOKR, lokr_w1_b=(2, 4)), "has lokr_w1_b beside"),
        (
            ONES | of_layer(dora_scale=(D, 1), lora_magnitude_vector=(D,)),
            "has dora_scale beside lora_A, lora_B, magnitude",
        ),
        (of_layer(diff=(D, D), set_weight=(D, D)), "has weight beside diff"),
        (ONES | of_layer(**LOKR), "has lokr_w1, lokr_w2 beside lora_A, lora_B"),
        (of_layer(**LOKR, **LOHA), "has lokr_w1, lokr_w2 beside hada_w1_a"),
    ],
)
def test_tensors_that_nothing_reads(tensors, text, tmp_path):
    refused(tmp_path, tensors, text, "expected one")


@pytest.mark.parametrize(
    "shapes",
    [
        LOKR | {"lokr_w1": ()},
        LOKR | {"lokr_w2": ()},
        LOKR | {"lokr_w2": (256,)},
        LOKR | {"lokr_w2": (2, 8, 16)},
        dict(lokr_w1=(4, 4), lokr_w2_a=(), lokr_w2_b=(2, 16)),
        dict(lokr_w1=(4, 4), lokr_w2_a=(16, 2), lokr_w2_b=()),
        dict(lokr_w1_a=(4,), lokr_w1_b=(4,), lokr_w2=(16, 16)),
        *(LOHA | {role: shape} for role in LOHA for shape in ((), (D,))),
    ],
)
def test_scalars_and_vectors_for_matrices(shapes, tmp_path):
    tensors = of_layer(**shapes)
    refused(tmp_path, tensors, "1 of 1 layers do not fit denoiser", "two matrices")


@pytest.mark.parametrize("rank, alpha", [(0, 1.0), (2, 1e30), (2, float("inf"))])
def test_scales_without_a_meaning(rank, alpha, tmp_path):
    tensors = lora(LAYER, rank=rank) | {f"{LAYER}.alpha": torch.tensor(alpha)}
    text = "1e+06 at most" if rank else "rank 0"
    refused(tmp_path, tensors, text)
