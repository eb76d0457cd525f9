"""Adapters that we write, in the tools that read them."""

import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from parity import miniature
from weights import adapter_models as models
from weights import test_adapter_kinds as kinds
from weights.test_adapter_names import adapter, flat

from sd3_jax.errors import UserError
from sd3_jax.params.adapters import Factors, Full
from sd3_jax.weights import adapter_writers
from sd3_jax.weights.safetensors import open_file

D = 64
QKV = [
    ("transformer_blocks.0.attn.to_q", D, D),
    ("transformer_blocks.0.attn.to_v", D, D),
    ("transformer_blocks.1.attn.add_k_proj", D, D),
    ("norm_out.linear", 2 * D, D),
    ("pos_embed.proj", D, 64),
    ("transformer_blocks.3.ff.net.2", D, 4 * D),
]


@pytest.fixture
def denoiser(tmp_path):
    """The denoiser, and what a file with three of its kinds of layers changes."""
    tensors = adapter("lora", lambda name: f"transformer.{name}", QKV)
    component = models.component("denoiser")
    return component, component.loaded(models.save(tmp_path / "a.safetensors", tensors))


def save(path, part, changes, naming, **options):
    modules = {part.name: part.module}
    adapter = {part.name: changes}
    return adapter_writers.save(path, adapter, modules, naming=naming, **options)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("naming", adapter_writers.NAMINGS)
def test_what_is_written_is_read_as_it_was(naming, compact, denoiser, tmp_path):
    part, changes = denoiser
    path = save(tmp_path / "b", part, changes, naming, compact=compact)
    wanted = models.added(part.params, changes)
    assert models.error(part.merged(path), wanted) < 1e-6
    # Layers of a stack that the file lacked are written only if not compact; the
    # original layout has q and v of block 0 in one.
    count = sum(".lora_A" in x or ".lora_down" in x for x in open_file(path)[0])
    least = len(QKV) - (naming in ("kohya", "comfyui"))
    assert count == least if compact else count > least


def test_peft_loads_a_folder(denoiser, tmp_path):
    part, changes = denoiser
    save(tmp_path / "b", part, changes, "peft", compact=True)
    base = miniature.transformer(**miniature.KINDS[models.KIND])
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "b")
    state = theirs.merge_and_unload().state_dict()
    state = {key: x for key, x in state.items() if key in part.state}
    wanted = models.added(part.params, changes)
    assert models.error(part.ours(part.state | state), wanted) < 1e-6


@pytest.mark.parametrize(
    "naming, prefix", [("kohya", "lora_unet_"), ("comfyui", "diffusion_model.")]
)
def test_comfyui_finds_and_merges_every_layer(naming, prefix, denoiser, tmp_path):
    """comfy/lora.py: key_map by names of the original file, then LoRAAdapter."""
    part, changes = denoiser
    file = save(tmp_path / "b", part, changes, naming, compact=True)
    tensors = safetensors.torch.load_file(file)
    base = kinds.miniature_in_the_original_layout()
    state = dict(base)
    for key, weight in base.items():
        layer = key.removesuffix(".weight")
        stem = prefix + (flat(layer) if naming == "kohya" else layer)
        if f"{stem}.lora_up.weight" not in tensors:
            continue
        ends = [x for x in tensors if x.startswith(f"{stem}.")]
        own = {end.removeprefix(f"{stem}."): tensors.pop(end) for end in ends}
        rank = len(own["lora_down.weight"])
        assert own.get("alpha", torch.tensor(float(rank))) == rank
        state[key] = weight + kinds.comfy_lora(own, weight.shape, 1.0)
    assert not tensors
    wanted = part.ours(part.state | kinds.to_diffusers(state))
    assert models.error(models.added(part.params, changes), wanted) < 1e-6


def test_kohyas_files_return_as_they_were(tmp_path):
    """q, k and v that share a factor are one pair again, of the same rank."""
    layers = [("joint_blocks_0_x_block_attn_qkv", 3 * D, D)]
    tensors = adapter("lora", lambda name: f"lora_unet_{name}", layers)
    part = models.component("denoiser")
    changes = part.loaded(models.save(tmp_path / "a.safetensors", tensors))
    file = save(tmp_path / "b.safetensors", part, changes, "kohya", compact=True)
    again = safetensors.torch.load_file(file)
    assert {k: x.shape for k, x in again.items()} == {
        k: x.shape for k, x in tensors.items()
    }
    down = "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"
    assert torch.equal(again[down], tensors[down])


@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
def test_whole_differences_return(naming, tmp_path):
    layers = [("joint_blocks_2_context_block_attn_qkv", 3 * D, D)]
    tensors = adapter("diff", lambda name: f"lora_unet_{name}", layers)
    part = models.component("denoiser")
    changes = part.loaded(models.save(tmp_path / "a.safetensors", tensors))
    again = part.loaded(save(tmp_path / "b.safetensors", part, changes, naming))
    jax.tree.map(np.testing.assert_array_equal, dict(again), dict(changes))


@pytest.mark.parametrize("naming", ["kohya", "comfyui"])
def test_text_encoders_return(naming, tmp_path):
    part = models.component("t5")
    name = "encoder.block.1.layer.1.DenseReluDense.wo"
    layer = name, *part.state[f"{name}.weight"].shape
    tensors = adapter("lora", lambda name: f"text_encoder_3.{name}", [layer])
    changes = part.loaded(models.save(tmp_path / "a.safetensors", tensors))
    file = save(tmp_path / "b.safetensors", part, changes, naming)
    wanted = models.added(part.params, changes)
    assert models.error(part.merged(file), wanted) < 1e-6


def test_what_a_naming_cannot_hold(denoiser, tmp_path):
    part, changes = denoiser
    whole = {("final", "bias"): Full(np.ones(64, np.float32))}

    def refused(text, adapter, naming, **options):
        modules = {name: part.module for name in adapter}
        with pytest.raises(UserError, match=text):
            adapter_writers.save(
                tmp_path / "b.safetensors", adapter, modules, naming=naming, **options
            )

    for naming in ("diffusers", "peft"):
        refused("changes 1 weights other than", {"denoiser": whole}, naming)
    refused("t5, which diffusers does not load", {"t5": changes}, "diffusers")
    two = {"denoiser": changes, "clip_l": changes}
    refused("PEFT's folder holds one", two, "peft")
    refused('did you mean "kohya"', {"denoiser": changes}, "kohia")
    big = {path: Factors(x.a, x.b * 1e6) for path, x in changes.items()}
    refused("overflows float16", {"denoiser": big}, "kohya", dtype=np.float16)
    none = {path: Factors(x.a, 0 * x.b) for path, x in changes.items()}
    refused("changes nothing", {"denoiser": none}, "kohya", compact=True)
