"""Each kind of adapter against the tool that makes it: merged weights in float32."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_sd3_transformer_checkpoint_to_diffusers as from_original,
)
from jax.sharding import NamedSharding, PartitionSpec
from lycoris import LycorisNetwork, create_lycoris
from lycoris.modules.norms import NormModule
from parity import miniature
from transformers import CLIPTextModelWithProjection, T5EncoderModel
from weights import adapter_models as models

from sd3_jax.distributed import sharding
from sd3_jax.params import parametrization, quantization
from sd3_jax.params.adapters import Factors, Full
from sd3_jax.weights import adapter_files

LIMIT = 1e-6  # of the largest value of a weight
TARGETS = ["to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.2", "norm_out.linear"]
CONVOLUTION = [*TARGETS, "pos_embed.proj"]


def transformer():
    return miniature.transformer(**miniature.KINDS[models.KIND])


def randomise(parameters, std=0.1):
    draw = torch.Generator().manual_seed(0)
    for x in parameters:
        with torch.no_grad():
            x.add_(std * torch.randn(x.shape, generator=draw))


PEFT = {
    "dora": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "dora-conv": peft.LoraConfig(r=4, use_dora=True, target_modules=CONVOLUTION),
    "conv": peft.LoraConfig(r=4, lora_alpha=3, target_modules=CONVOLUTION),
    "rslora": peft.LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=TARGETS,
        rank_pattern={"to_v": 7},
        alpha_pattern={"to_q": 5},
    ),
    "lora-bias": peft.LoraConfig(
        r=4, lora_alpha=6, lora_bias=True, target_modules=["to_q", "ff.net.2"]
    ),
    "bias-all": peft.LoraConfig(r=4, bias="all", target_modules=TARGETS),
    "bias-lora": peft.LoraConfig(r=4, bias="lora_only", target_modules=TARGETS),
    "modules-to-save": peft.LoraConfig(
        r=4, target_modules=["to_q"], modules_to_save=["proj_out", "norm1.linear"]
    ),
    "lokr": peft.LoKrConfig(r=4, alpha=6, target_modules=TARGETS),
    "lokr-both": peft.LoKrConfig(
        r=2, alpha=3, decompose_both=True, decompose_factor=8, target_modules=TARGETS
    ),
    "lokr-whole": peft.LoKrConfig(r=64, alpha=96, target_modules=TARGETS),
    "lokr-conv": peft.LoKrConfig(
        r=2, use_effective_conv2d=True, target_modules=CONVOLUTION
    ),
    "lokr-flat-conv": peft.LoKrConfig(r=2, target_modules=CONVOLUTION),
    "loha": peft.LoHaConfig(
        r=4, alpha=6, target_modules=TARGETS, rank_pattern={"to_v": 3}
    ),
    "loha-conv": peft.LoHaConfig(
        r=4, alpha=6, use_effective_conv2d=True, target_modules=CONVOLUTION
    ),
    "loha-flat-conv": peft.LoHaConfig(r=4, target_modules=CONVOLUTION),
}


# PEFT takes the vector lora_B.bias for a damaged matrix.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("kind", PEFT)
def test_folders_of_peft(kind, tmp_path):
    theirs = peft.get_peft_model(transformer(), PEFT[kind])
    randomise(x for x in theirs.parameters() if x.requires_grad)
    theirs.save_pretrained(tmp_path)
    state = theirs.merge_and_unload().state_dict()
    check(models.component("denoiser"), tmp_path, state)


def check(component, path, state):
    """Ours are the weights of a state dict, which differ from the base's."""
    state = {key: x for key, x in state.items() if key in component.state}
    wanted = component.ours(component.state | state)
    assert models.error(component.params, wanted) > 0.02
    error = models.error(component.merged(path), wanted)
    print(f"{error:.1e}")
    assert error < LIMIT


@pytest.mark.parametrize("name, layer", [("clip_g", "q_proj"), ("t5", "wi_1")])
def test_dora_of_a_text_encoder(name, layer, tmp_path):
    kinds = {"clip_g": CLIPTextModelWithProjection, "t5": T5EncoderModel}
    folders = {"clip_g": "text_encoder_2", "t5": "text_encoder_3"}
    folder = miniature.folder(models.KIND) / folders[name]
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=[layer])
    theirs = peft.get_peft_model(kinds[name].from_pretrained(folder), config)
    randomise(x for x in theirs.parameters() if x.requires_grad)
    state = peft.get_peft_model_state_dict(theirs)
    start = "base_model.model."
    names = {f"{folders[name]}.{k.removeprefix(start)}": x for k, x in state.items()}
    fields = dict(r=3, lora_alpha=8, use_dora=True)
    about = {f"{folders[name]}.{k}": v for k, v in fields.items()}
    file = models.save(
        tmp_path / "x.safetensors",
        names,
        {"lora_adapter_metadata": json.dumps(about)},
    )
    merged = theirs.merge_and_unload().state_dict()
    component = models.component(name)
    # transformers 5 has no "text_model." in the names of a CLIP with projection.
    renamed = {f"text_model.{key}": x for key, x in merged.items()} | merged
    check(component, file, renamed)


LYCORIS = {  # alpha is not the rank, but where all matrices are whole
    "lora": dict(algo="locon"),
    "locon": dict(algo="locon", use_tucker=True),
    "dora": dict(algo="locon", dora_wd=True),
    "dora-input": dict(algo="locon", dora_wd=True, wd_on_output=False),
    "loha": dict(algo="loha"),
    "loha-tucker": dict(algo="loha", use_tucker=True),
    "loha-dora": dict(algo="loha", dora_wd=True),
    "lokr": dict(algo="lokr", factor=4),
    "lokr-both": dict(algo="lokr", decompose_both=True, factor=8),
    "lokr-tucker": dict(algo="lokr", use_tucker=True, factor=2),
    "lokr-whole": dict(algo="lokr", full_matrix=True),
    "lokr-dora": dict(algo="lokr", dora_wd=True, wd_on_output=False),
    "full": dict(algo="full"),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_files_of_lycoris(kind, tmp_path):
    model = transformer()
    LycorisNetwork.apply_preset(
        {"target_module": ["PatchEmbed", "FeedForward", "AdaLayerNormContinuous"]}
    )
    network = create_lycoris(
        model, linear_dim=2, linear_alpha=3, conv_dim=2, conv_alpha=3, **LYCORIS[kind]
    )
    network.apply_to()
    randomise(network.parameters())
    model.double(), network.double()  # of what forward computes, the float32 below
    file = models.save(tmp_path / "x.safetensors", float32(network.state_dict()))
    state = {
        f"{name}.{part}": x
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
        for part, x in effective(module).items()
    }
    check(models.component("denoiser"), file, float32(state))


def float32(state):
    return {key: x.detach().float() for key, x in state.items()}


def effective(module):
    """The weight and bias that a module multiplies with: those of its outputs.

    LyCORIS 4.1's merge multiplies LoHa and LoKr by alpha / rank twice, forward once.
    """
    with torch.no_grad():
        if isinstance(module, torch.nn.Conv2d):
            shape = module.in_channels, *module.kernel_size
            x = torch.eye(int(np.prod(shape)), dtype=torch.double).reshape(-1, *shape)
            zero = module(torch.zeros(1, *shape, dtype=torch.double)).flatten()
            weight = (module(x).flatten(1) - zero).T.reshape(-1, *shape)
        else:
            zero = module(torch.zeros(1, module.in_features, dtype=torch.double))[0]
            weight = (
                module(torch.eye(module.in_features, dtype=torch.double)) - zero
            ).T
    return {"weight": weight, "bias": zero}


def test_norms_of_lycoris(tmp_path):
    folder = miniature.folder(models.KIND) / "text_encoder"
    model = CLIPTextModelWithProjection.from_pretrained(folder)
    tensors, state = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            name = name if "text_model" in name else f"text_model.{name}"
            norm = NormModule(f"lora_te1_{name.replace('.', '_')}", module)
            randomise(norm.parameters())
            tensors |= {
                f"{norm.lora_name}.{k}": x for k, x in norm.state_dict().items()
            }
            weight, bias = norm.get_merged_weight()
            state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    assert len(tensors) == 14
    file = models.save(tmp_path / "x.safetensors", tensors)
    check(models.component("clip_l"), file, state)


# --- ComfyUI's formulas (comfy/weight_adapter), on names of the original layout


def comfy_lora(t, shape, scale):
    up, down = t["lora_up.weight"], t["lora_down.weight"]
    if "lora_mid.weight" in t:  # lora.py, calculate_weight
        mid = t["lora_mid.weight"]
        final = [down.shape[1], down.shape[0], mid.shape[2], mid.shape[3]]
        down = (
            torch.mm(
                down.transpose(0, 1).flatten(start_dim=1),
                mid.transpose(0, 1).flatten(start_dim=1),
            )
            .reshape(final)
            .transpose(0, 1)
        )
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(shape)


def comfy_loha(t, shape, scale):
    sides = []
    for i in "12":
        a, b = t[f"hada_w{i}_a"], t[f"hada_w{i}_b"]
        if f"hada_t{i}" in t:
            side = torch.einsum("i j k l, j r, i p -> p r k l", t[f"hada_t{i}"], b, a)
        else:
            side = a @ b
        sides.append(side)
    return scale * (sides[0] * sides[1]).reshape(shape)


def comfy_lokr(t, shape, scale):
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = torch.einsum(
            "i j k l, j r, i p -> p r k l",
            *(t[f"lokr_{x}"] for x in ("t2", "w2_b", "w2_a")),
        )
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"]
    if w2.ndim == 4:
        w1 = w1[:, :, None, None]
    return scale * torch.kron(w1, w2).reshape(shape)


def by_input(weight, delta, norms):
    """weight_decompose of base.py, for norms of shape (1, in): scale per input."""
    total = weight + delta
    length = total.transpose(0, 1).flatten(1).norm(dim=1)
    length = length.reshape(1, -1, *[1] * (weight.ndim - 2))
    return total * (norms / length) - weight


D = 64
CONV = (D, 16, 2, 2)
# By the layer's name in the original layout: the tensors' shapes and the formula.
COMFY = {
    "locon": (
        "x_embedder.proj",
        {
            "lora_up.weight": (D, 3, 1, 1),
            "lora_down.weight": (3, 16, 1, 1),
            "lora_mid.weight": (3, 3, 2, 2),
        },
        comfy_lora,
    ),
    "loha-tucker": (
        "x_embedder.proj",
        {f"hada_t{i}": (3, 3, 2, 2) for i in "12"}
        | {f"hada_w{i}_a": (3, D) for i in "12"}
        | {f"hada_w{i}_b": (3, 16) for i in "12"},
        comfy_loha,
    ),
    "lokr-tucker": (
        "x_embedder.proj",
        {
            "lokr_w1": (4, 2),
            "lokr_t2": (3, 3, 2, 2),
            "lokr_w2_a": (3, 16),
            "lokr_w2_b": (3, 8),
        },
        comfy_lokr,
    ),
    "lora-qkv": (
        "joint_blocks.1.x_block.attn.qkv",
        {"lora_up.weight": (3 * D, 3), "lora_down.weight": (3, D)},
        comfy_lora,
    ),
    "lora-1x1": (
        "joint_blocks.1.context_block.mlp.fc1",
        {"lora_up.weight": (4 * D, 3, 1, 1), "lora_down.weight": (3, D, 1, 1)},
        comfy_lora,
    ),
    "loha-qkv": (
        "joint_blocks.2.context_block.attn.qkv",
        {f"hada_w{i}_a": (3 * D, 3) for i in "12"}
        | {f"hada_w{i}_b": (3, D) for i in "12"},
        comfy_loha,
    ),
    "lokr-qkv": (
        "joint_blocks.3.context_block.attn.qkv",
        {"lokr_w1_a": (6, 3), "lokr_w1_b": (3, 4), "lokr_w2": (32, 16)},
        comfy_lokr,
    ),
    "diff-qkv": (
        "joint_blocks.0.x_block.attn2.qkv",
        {"diff": (3 * D, D), "diff_b": (3 * D,)},
        lambda t, shape, scale: t["diff"],
    ),
    "diff-norm": (
        "joint_blocks.0.x_block.attn.ln_q",
        {"diff": (D,)},
        lambda t, shape, scale: t["diff"],
    ),
    "swapped": (
        "final_layer.adaLN_modulation.1",
        {"lora_up.weight": (2 * D, 3), "lora_down.weight": (3, D), "diff_b": (2 * D,)},
        comfy_lora,
    ),
}


@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("kind", COMFY)
def test_files_of_comfyui(kind, dora, tmp_path):
    """diffusers turns the merged original weights into its own layout."""
    layer, shapes, formula = COMFY[kind]
    base = miniature_in_the_original_layout()
    weight = base[f"{layer}.weight"]
    draw = torch.Generator().manual_seed(1)
    tensors = {k: 0.3 * torch.randn(s, generator=draw) for k, s in shapes.items()}
    alpha = "diff" not in tensors
    delta = formula(tensors, weight.shape, 2.0 / 3 if alpha else 1.0)
    if dora and weight.ndim > 1 and alpha:
        norms = 1 + torch.rand(1, *weight.shape[1:2], *[1] * (weight.ndim - 2))
        tensors["dora_scale"] = norms
        delta = by_input(weight, delta, norms)
    if alpha:
        tensors["alpha"] = torch.tensor(2.0)
    changed = base | {f"{layer}.weight": weight + delta}
    if "diff_b" in tensors:
        changed[f"{layer}.bias"] = base[f"{layer}.bias"] + tensors["diff_b"]
    file = models.save(
        tmp_path / "x.safetensors",
        {f"diffusion_model.{layer}.{k}": x for k, x in tensors.items()},
    )
    check(models.component("denoiser"), file, to_diffusers(changed))


def miniature_in_the_original_layout():
    component = models.component("denoiser")
    pieces = models.pieces("denoiser", "original")
    values = lambda piece: piece.write(models.part(component.params, piece))
    arrays = {x.key: torch.tensor(np.ascontiguousarray(values(x))) for x in pieces}
    return arrays | {"pos_embed": component.state["pos_embed.pos_embed"]}


def to_diffusers(state):
    return from_original(dict(state))


def test_a_sum_of_kinds_in_one_stack_is_whole(tmp_path):
    """LoRA in block 0 and a difference in block 1, which lie in one leaf."""
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, D, generator=draw), torch.randn(D, 2, generator=draw)
    diff = torch.randn(D, D, generator=draw)
    first, second = (f"transformer_blocks.{i}.attn.to_q" for i in (0, 1))
    file = models.save(
        tmp_path / "x.safetensors",
        {
            f"transformer.{first}.lora_A.weight": a,
            f"transformer.{first}.lora_B.weight": b,
            f"transformer.{first}.diff": diff,
            f"transformer.{second}.diff": diff.clone(),
        },
    )
    component = models.component("denoiser")
    (change,) = component.loaded(file).values()
    assert isinstance(change, Full)
    state = dict(component.state)
    state[f"{first}.weight"] = state[f"{first}.weight"] + b @ a + diff
    state[f"{second}.weight"] = state[f"{second}.weight"] + diff
    check(component, file, state)


def test_linear_maps_with_lora_alone_stay_factors(tmp_path):
    theirs = peft.get_peft_model(transformer(), PEFT["bias-all"])
    randomise(x for x in theirs.parameters() if x.requires_grad)
    theirs.save_pretrained(tmp_path)
    for path, change in models.component("denoiser").loaded(tmp_path).items():
        assert isinstance(change, Factors if path[-1] == "kernel" else Full), path


def test_dora_needs_the_values_of_its_base(tmp_path):
    theirs = peft.get_peft_model(transformer(), PEFT["dora"])
    theirs.save_pretrained(tmp_path)
    component = models.component("denoiser")
    layers = adapter_files.read(tmp_path)["denoiser"]
    shapes = models.shapes_of("denoiser")["params"]
    with pytest.raises(ValueError, match="needs the base's values"):
        adapter_files.load(layers, "denoiser", component.module, shapes)


def test_dora_of_a_base_that_is_sharded_or_in_eight_bits(tmp_path):
    theirs = peft.get_peft_model(transformer(), PEFT["dora"])
    randomise(x for x in theirs.parameters() if x.requires_grad)
    theirs.save_pretrained(tmp_path)
    component = models.component("denoiser")
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shard = lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))
    put = lambda x: jax.device_put(x, shard(x)) if x.shape[-1] % 4 == 0 else x
    sharded = component._replace(params=jax.tree.map(put, component.params))
    jax.tree.map(
        np.testing.assert_array_equal,
        dict(sharded.loaded(tmp_path)),
        dict(component.loaded(tmp_path)),
    )
    # --- the norms are of the values that the rounded base stands for
    eight = quantization.quantized(jax.device_put(component.params), "int8")
    floats = jax.tree.map(np.asarray, parametrization.arrays(eight))
    changes = [component._replace(params=x).loaded(tmp_path) for x in (eight, floats)]
    jax.tree.map(np.testing.assert_array_equal, *map(dict, changes))


@pytest.mark.parametrize("weight", [0.5, -1.0])
def test_other_weights_of_dora_blend_as_comfyui_does(weight, tmp_path):
    theirs = peft.get_peft_model(transformer(), PEFT["dora"])
    randomise(x for x in theirs.parameters() if x.requires_grad)
    theirs.save_pretrained(tmp_path)
    component = models.component("denoiser")
    at_one = component.merged(tmp_path)
    blend = component.merged(tmp_path, weight)
    lerp = lambda w, x: w + weight * (x - w)
    wanted = jax.tree.map(lerp, component.params, at_one)
    assert models.error(blend, wanted) < LIMIT


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_small_floats_are_read_exactly(dtype, tmp_path):
    draw = torch.Generator().manual_seed(0)
    layer = "transformer_blocks.0.attn.to_q"
    a, b = (torch.randn(s, generator=draw).to(dtype) for s in ((2, D), (D, 2)))
    file = models.save(
        tmp_path / "x.safetensors",
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b},
    )
    component = models.component("denoiser")
    delta = b.float() @ a.float()
    check(
        component, file, {f"{layer}.weight": component.state[f"{layer}.weight"] + delta}
    )
