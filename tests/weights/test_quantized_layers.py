"""Quantized layers of safetensors files, against the libraries that made them."""

import json

import bitsandbytes
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from bitsandbytes import functional

from sd3_jax.errors import UserError
from sd3_jax.weights import safetensors as files
from sd3_jax.weights.stored_tensor import QuantizedTensor, eight_bits

NAME = "joint_blocks.0.x_block.attn.proj"
# Rows are whole blocks: for others bitsandbytes' kernel for CPUs differs from its own
# rule, which the one for odd rows follows, and that of GPUs.
WIDE = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))


def opened(tmp_path, tensors, **metadata):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata=metadata or None)
    return files.open_file(path)[0]


def refusal(tmp_path, tensors, **metadata) -> str:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, tensors, **metadata)
    message = str(caught.value)
    assert message.isprintable() and "a.safetensors" in message and len(message) < 400
    return message


def same(ours, theirs):
    """Equal to 1e-6 of the largest, in the same dtype."""
    assert str(theirs.dtype) == f"torch.{ours.dtype}"
    ours, theirs = ours.astype(np.float32), theirs.float().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


# bitsandbytes


def four_bits(x=WIDE, kind="nf4", **options):
    packed, state = functional.quantize_4bit(x, quant_type=kind, **options)
    parts = {f"{NAME}.weight": packed}
    parts |= {f"{NAME}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return parts, functional.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind, double, dtype, tmp_path):
    x = WIDE.to(dtype)
    parts, wanted = four_bits(x, kind, blocksize=64, compress_statistics=double)
    assert (f"{NAME}.weight.nested_absmax" in parts) == double
    tensor = opened(tmp_path, parts)[f"{NAME}.weight"]
    assert tensor.shape == (96, 128) and tensor.form.startswith(kind)
    same(tensor.read(), wanted)


def test_double_quantization_of_many_blocks(tmp_path):
    """More than the 256 blocks that share a scale of scales."""
    x = torch.randn(130, 256, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-2, 1, 130)[:, None]
    parts, wanted = four_bits(x, blocksize=64, compress_statistics=True)
    assert len(parts[f"{NAME}.weight.nested_absmax"]) == 3
    same(opened(tmp_path, parts)[f"{NAME}.weight"].read(), wanted)


def test_blocks_that_do_not_fill_the_weight(tmp_path):
    parts, wanted = four_bits(WIDE[:7, :11].contiguous(), blocksize=64)
    same(opened(tmp_path, parts)[f"{NAME}.weight"].read(), wanted)


def test_four_bits_in_another_storage(tmp_path):
    parts, wanted = four_bits(quant_storage=torch.bfloat16)
    assert parts[f"{NAME}.weight"].dtype == torch.bfloat16
    same(opened(tmp_path, parts)[f"{NAME}.weight"].read(), wanted)


def eight(x=WIDE):
    """The state dict of bitsandbytes' own layer, and its dequantization."""
    layer = bitsandbytes.nn.Linear8bitLt(128, 96, bias=True, has_fp16_weights=False)
    q, scale, _ = functional.int8_vectorwise_quant(x.half())
    layer.weight.data, layer.weight.SCB = q, scale
    layer.weight.CB = q
    state = {f"{NAME}.{k}": v for k, v in layer.state_dict().items()}
    assert f"{NAME}.SCB" in state and f"{NAME}.weight_format" in state
    return state, functional.int8_vectorwise_dequant(q, scale)


def test_int8_by_rows(tmp_path):
    state, wanted = eight()
    tensors = opened(tmp_path, state)
    assert set(tensors) == {f"{NAME}.weight", f"{NAME}.bias"}
    same(tensors[f"{NAME}.weight"].read(), wanted)
    q, scale = tensors[f"{NAME}.weight"].eight.read()
    same(q * scale, wanted)


def test_double_quantization_without_codes(tmp_path):
    parts, _ = four_bits(compress_statistics=True)
    key = f"{NAME}.weight.absmax"
    told = refusal(tmp_path, parts | {key: parts[key].float()})
    assert "absmax is of float32, expected uint8 beside nested_absmax" in told


@pytest.mark.parametrize("field", ["nested_offset", "nested_blocksize"])
def test_double_quantization_without_a_field(field, tmp_path):
    """bitsandbytes raises too; an offset of 0 would give other weights in silence."""
    parts, _ = four_bits(compress_statistics=True)
    state = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
    fields = json.loads(bytes(parts[state].numpy()))
    del fields[field]
    parts[state] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
    assert f"its quant_state lacks '{field}'" in refusal(tmp_path, parts)


FAULTS = {  # what is changed of a file in nf4 with double quantization, and the message
    "absmax": ("weight.absmax is missing: without it the nf4 weight cannot be read"),
    "quant_map": "weight.quant_map is missing",
    "nested_absmax": "weight.nested_absmax is missing",
    "nested_quant_map": "weight.nested_quant_map is missing",
    "quant_state.bitsandbytes__nf4": "has 0 of .quant_state.bitsandbytes__TYPE",
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_part_that_is_missing(part, tmp_path):
    parts, _ = four_bits(compress_statistics=True)
    del parts[f"{NAME}.weight.{part}"]
    assert FAULTS[part] in refusal(tmp_path, parts)


def test_parts_that_do_not_fit(tmp_path):
    parts, _ = four_bits(blocksize=64)
    key = f"{NAME}.weight"
    state = f"{key}.quant_state.bitsandbytes__nf4"

    def changed(**settings):
        told = json.loads(bytes(parts[state].numpy())) | settings
        data = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
        return refusal(tmp_path, parts | {state: data})

    absmax = parts[f"{key}.absmax"]
    short = parts | {f"{key}.absmax": absmax[:-1].clone()}
    assert "absmax has [191] values, expected 192" in refusal(tmp_path, short)
    alone = {k: x for k, x in parts.items() if k != key}
    assert f"{key} is missing, but its absmax" in refusal(tmp_path, alone)
    assert "quant_type nf5, expected nf4" in changed(quant_type="nf5")
    other = {k: x for k, x in parts.items() if k != state}
    other[state.replace("nf4", "nf3")] = parts[state]
    assert 'quant_type "nf3": expected nf4 or fp4' in refusal(tmp_path, other)
    assert "has 6144 bytes, expected 5760 for [90, 128]" in changed(
        shape=[90, 128], blocksize=60
    )
    assert "absmax has [192] values, expected 194" in changed(shape=[97, 128])
    for settings in dict(blocksize=0), dict(dtype="int8"), dict(shape=[-1]):
        assert "its quant_state is damaged" in changed(**settings)


def test_int8_whose_scales_do_not_fit(tmp_path):
    state, _ = eight()
    scale = state.pop(f"{NAME}.SCB")
    assert f"{NAME}.SCB, the scales of its rows, is missing" in refusal(tmp_path, state)
    state[f"{NAME}.SCB"] = scale[:-1].clone()
    assert "SCB is [95] of float32, expected [96] floats" in refusal(tmp_path, state)
    state |= {f"{NAME}.SCB": scale, f"{NAME}.weight_format": torch.tensor(1).byte()}
    assert "in a GPU's layout" in refusal(tmp_path, state)


# ComfyUI: W = q * scale (QUANTIZATION.md)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scaled(name="scale_weight"):
    scale = WIDE.abs().max() / torch.finfo(E4M3).max
    q = (WIDE / scale).to(E4M3)
    return {f"{NAME}.weight": q, f"{NAME}.{name}": scale}, q.float() * scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape", [(), (1,), (96,), (96, 1)])
def test_scaled_fp8(shape, dtype, tmp_path):
    """As t5xxl_fp8_e4m3fn_scaled and sd3.5_large_fp8_scaled are written."""
    scale = torch.rand(shape) + 0.01
    by_row = scale.reshape(-1, 1) if shape else scale
    q = (WIDE / by_row).clamp(-400, 400).to(dtype)
    parts = {f"{NAME}.weight": q, f"{NAME}.scale_weight": scale}
    wanted = q.float() * by_row
    marks = {"scaled_fp8": torch.zeros(2, dtype=dtype)}
    marks[f"{NAME}.scale_input"] = torch.ones(())
    marks["pos_embed"] = torch.ones(1, 4, 8)
    tensors = opened(tmp_path, parts | marks)
    assert set(tensors) == {f"{NAME}.weight", "pos_embed"}
    same(tensors[f"{NAME}.weight"].read(), wanted)


def comfy(settings):
    data = list(json.dumps(settings).encode())
    return {f"{NAME}.comfy_quant": torch.tensor(data, dtype=torch.uint8)}


def test_comfyuis_layers_of_today(tmp_path):
    parts, wanted = scaled(name="weight_scale")
    more = comfy({"format": "float8_e4m3fn", "full_precision_matrix_mult": True})
    key = f"{NAME}.weight"
    same(opened(tmp_path, parts | more)[key].read(), wanted)
    layers = {NAME.removeprefix("x."): {"format": "float8_e4m3fn"}}
    metadata = json.dumps({"format_version": "1.0", "layers": layers})
    same(opened(tmp_path, parts, _quantization_metadata=metadata)[key].read(), wanted)
    plain = parts | {key: parts[key].view(torch.uint8)}  # in a container of bytes
    same(opened(tmp_path, plain | more)[key].read(), wanted)
    rows = WIDE.abs().amax(1, keepdim=True) / 127
    parts = {key: (WIDE / rows).round().char(), f"{NAME}.weight_scale": rows}
    more = comfy({"format": "int8_tensorwise"})
    same(opened(tmp_path, parts | more)[key].read(), parts[key].float() * rows)


def test_scales_that_are_missing_or_do_not_fit(tmp_path):
    parts, _ = scaled()
    key, scale = f"{NAME}.weight", f"{NAME}.scale_weight"
    marked = {key: parts[key], "scaled_fp8": torch.zeros(2, dtype=E4M3)}
    assert "1 matrices in fp8 have no scale_weight" in refusal(tmp_path, marked)
    assert f"{key} is missing" in refusal(tmp_path, {scale: parts[scale]})
    for shape in (2,), (95,), (1, 96), (96, 2):
        told = refusal(tmp_path, parts | {scale: torch.ones(shape)})
        assert (
            f"the scale of {key} is {list(shape)}, expected one number or [96]" in told
        )
    ints = parts | {scale: torch.ones((), dtype=torch.int32)}
    assert "is of int32, expected floats" in refusal(tmp_path, ints)
    told = refusal(tmp_path, {key: parts[key]} | comfy({"format": "float8_e4m3fn"}))
    assert "is incomplete: it lacks weight_scale" in told
    twice = parts | {f"{NAME}.weight_scale": torch.ones(())}
    assert "has both scale_weight and weight_scale" in refusal(tmp_path, twice)
    endless = opened(tmp_path, parts | {scale: torch.tensor(torch.inf)})
    with pytest.raises(UserError, match="the scale of .* is NaN or infinite"):
        endless[key].read()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_packed_bytes_are_no_values_of_a_scale(dtype, tmp_path):
    """Four-bit formats hold two values a byte beside scales of the same name."""
    parts = {f"{NAME}.weight": torch.ones(96, 64).to(dtype)}
    parts[f"{NAME}.weight_scale"] = torch.ones(96)
    assert "with a scale, expected fp8 or int8" in refusal(tmp_path, parts)


def test_metadata_of_a_layer_that_is_not_there(tmp_path):
    layers = {"layer": {"format": "float8_e4m3fn"}}
    told = refusal(
        tmp_path, scaled()[0], _quantization_metadata=json.dumps({"layers": layers})
    )
    assert "layer.weight is missing, but _quantization_metadata lists it" in told


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"format": "nvfp4"}, "ComfyUI's nvfp4"),
        ({"format": "float8_e4m3fn", "convrot": True}, "with rotations"),
        ({"format": "int8_tensorwise"}, "is of float8_e4m3fn, but its comfy_quant"),
        ({}, "expected a format"),
        ([], "expected a format"),
    ],
)
def test_formats_of_comfyui_that_are_not_read(settings, words, tmp_path):
    parts, _ = scaled(name="weight_scale")
    assert words in refusal(tmp_path, parts | comfy(settings))


def test_a_scale_in_another_shard(tmp_path):
    parts, wanted = scaled()
    names = {
        key: f"model-{i:05}-of-00002.safetensors" for i, key in enumerate(parts, 1)
    }
    for key, name in names.items():
        safetensors.torch.save_file({key: parts[key]}, tmp_path / name)
    text = json.dumps({"weight_map": names})
    same(files.open_folder(tmp_path)[f"{NAME}.weight"].read(), wanted)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    same(files.open_folder(tmp_path)[f"{NAME}.weight"].read(), wanted)


def test_plain_eight_bit_floats_are_weights_with_a_scale_of_one(tmp_path):
    tensor = opened(tmp_path, {"w.weight": WIDE.to(E4M3)})["w.weight"]
    assert not isinstance(tensor, QuantizedTensor)
    q, scale = eight_bits(tensor).read()
    assert q.dtype == ml_dtypes.float8_e4m3fn and scale == 1
