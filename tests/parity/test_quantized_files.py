"""Quantized files that people have, loaded here and by the tool that wrote them."""

import logging
import re

import bitsandbytes
import diffusers
import gguf
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from parity import convert, miniature
from parity.test_bundle import published
from parity.test_mmdit import run, run_theirs

import sd3_jax
from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import lora, quantization
from sd3_jax.params.quantization import Float8, Int8

KIND = "sd35_medium"  # of all kinds of blocks
FOLDER = miniature.ROOT / f"{KIND}-{miniature.VERSION}" / "transformer"
TYPES = gguf.GGMLQuantizationType
PREFIX = "model.diffusion_model."
draw = np.random.default_rng(0).standard_normal
INPUTS = (  # x, t, context, pooled
    draw((2, 8, 8, 16)).astype(np.float32),
    np.array([0.313, 0.999], np.float32),
    draw((2, 20, 160)).astype(np.float32),
    draw((2, 128)).astype(np.float32),
)


def load(*sources, devices=1, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    options = dict(dtype="float32", tokenizers_from=None) | options
    return sd3_jax.load([str(x) for x in sources], mesh=mesh, **options)


def velocity(bundle):
    part = bundle.variables["denoiser"]
    return run(bundle.modules["denoiser"], part, *INPUTS)


def denoiser():
    """The denoiser as in Stability's files, in PyTorch."""
    state = {k: x for k, x in published(KIND).items() if k.startswith(PREFIX)}
    return {k.removeprefix(PREFIX): x.float() for k, x in state.items()}


@pytest.fixture(scope="module", autouse=True)
def made():
    miniature.folder(KIND)


# GGUF


def k_blocks(kind, rows, width):
    """Random blocks of a K-quant; their scales make weights of the usual size."""
    size = gguf.GGML_QUANT_SIZES[TYPES[kind]][1]
    raw = np.random.default_rng(0).integers(0, 256, (rows, width // 256, size))
    raw = raw.astype(np.uint8)
    half = lambda x: np.frombuffer(np.float16(x).tobytes(), np.uint8)
    if kind == "Q4_K":  # d and dmin come first; d at the end of Q6_K
        raw[..., :2], raw[..., 2:4] = half(1e-4), half(5e-4)
    else:
        raw[..., -2:] = half(2e-5)
    return raw.reshape(rows, -1)


def comfy_gguf(path, prefix="", arch="sd3"):
    """Written by the rules of ComfyUI-GGUF's convert.py, in a mixture of types.

    Returns its dequantized weights.
    """
    writer = gguf.GGUFWriter(path, arch)
    cycle, dequantized = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"], {}
    for i, (key, x) in enumerate(denoiser().items()):
        x = x.numpy()
        kind = "F32" if x.ndim == 1 or x.size <= 1024 else cycle[i % len(cycle)]
        if x.ndim > 2:
            kind = "F16"
        if x.ndim == 2 and x.shape[1] == 256:
            kind = "Q4_K" if i % 2 else "Q6_K"
            data = k_blocks(kind, *x.shape)
        else:
            data = gguf.quantize(x, TYPES[kind])
        writer.add_tensor(prefix + key, data, raw_dtype=TYPES[kind])
        dequantized[key] = torch.tensor(gguf.dequantize(data, TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantized


@pytest.fixture(scope="module")
def gguf_pair(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "sd3.5-Q4_K.gguf"
    return path, comfy_gguf(path)


@pytest.fixture(scope="module")
def gguf_file(gguf_pair):
    return gguf_pair[0]


def test_a_gguf_file_gives_the_velocity_of_its_weights(gguf_pair, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path, dequantized = gguf_pair
    bundle = load(path)
    assert convert.error(velocity(bundle), their_velocity(dequantized)) < 1e-4
    (line,) = [x for x in caplog.messages if ": read " in x]
    assert re.search(r"\d+ of float32, .*\d+ of Q8_0", line) and " as float32" in line
    comfy_gguf(tmp_path / "a.gguf", PREFIX, "pig")
    other = load(tmp_path / "a.gguf")
    jax.tree.map(np.testing.assert_array_equal, bundle.variables, other.variables)


def test_diffusers_reads_the_same_of_a_gguf_file(gguf_file):
    theirs = diffusers.SD3Transformer2DModel.from_single_file(
        str(gguf_file),
        config=str(FOLDER),
        quantization_config=diffusers.GGUFQuantizationConfig(
            compute_dtype=torch.float32
        ),
        torch_dtype=torch.float32,
    )
    # It dequantizes in float16, whatever compute_dtype says.
    wanted = run_theirs(theirs, *INPUTS)
    assert convert.error(velocity(load(gguf_file)), wanted) < 4e-3


def t5_gguf(path):
    """T5's encoder as llama.cpp writes it: gguf-py's names, norms in float32."""
    writer = gguf.GGUFWriter(path, "t5encoder")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    writer.add_token_list([f"word{i}" for i in range(100)])
    dequantized = {}
    for key, x in miniature.t5().state_dict().items():
        if key.endswith("embed_tokens.weight"):
            continue
        name = table.get_name(key, try_suffixes=(".weight",))
        kind = "Q8_0" if x.ndim == 2 and "_rel_b" not in name else "F32"
        if x.shape[-1] % 32:  # as ComfyUI-GGUF falls back
            kind = "F16"
        data = gguf.quantize(x.numpy(), TYPES[kind])
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
        dequantized[key] = torch.tensor(gguf.dequantize(data, TYPES[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dequantized


def same_t5(bundle, dequantized):
    theirs = miniature.t5().eval()
    faults = theirs.load_state_dict(dequantized, strict=False)
    assert set(faults.missing_keys) <= {"encoder.embed_tokens.weight"}
    ids = np.array([[5, 9, 33, 1, 0, 0], [7, 1, 0, 0, 0, 0]])
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).last_hidden_state
    got = run(bundle.modules["t5"], bundle.variables["t5"], ids)
    assert convert.error(got, wanted) < 1e-4


def test_t5_from_gguf_beside_a_folder(tmp_path):
    dequantized = t5_gguf(tmp_path / "t5-v1_1-xxl-encoder-Q8_0.gguf")
    files = miniature.folder(KIND), tmp_path / "t5-v1_1-xxl-encoder-Q8_0.gguf"
    bundle = load(*files, tokenizers_from="")
    assert len(bundle.modules) == 5
    same_t5(bundle, dequantized)


# bitsandbytes


def rules_of_bitsandbytes(tensors):
    """A state dict with its packed weights dequantized by the library's own rule."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as rule

    functional, state = bitsandbytes.functional, dict(tensors)
    for key in [k.removesuffix(".absmax") for k in tensors if k.endswith("t.absmax")]:
        parts = {k: state.pop(k) for k in list(state) if k.startswith(f"{key}.")}
        quant = functional.QuantState.from_dict(parts, "cpu")
        absmax = quant.absmax
        if quant.nested:
            absmax = functional.dequantize_blockwise(absmax, quant.state2)
            absmax += quant.offset
        args = state[key].reshape(-1), absmax, quant.code, quant.blocksize, quant.shape
        state[key] = rule(*args, quant.dtype)
    for key in [k for k in tensors if k.endswith(".SCB")]:
        name = key.removesuffix("SCB") + "weight"
        scale, _ = state.pop(key), state.pop(f"{name}_format")
        state[name] = functional.int8_vectorwise_dequant(state[name], scale)
    return state


@pytest.mark.parametrize("bits", [4, 8])
def test_t5_that_transformers_saved(bits, tmp_path, caplog):
    options = {4: dict(load_in_4bit=True), 8: dict(load_in_8bit=True)}[bits]
    if bits == 4:
        options |= dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    transformers.T5EncoderModel.from_pretrained(
        miniature.folder(KIND) / "text_encoder_3",
        quantization_config=transformers.BitsAndBytesConfig(**options),
        dtype=torch.float32,
        device_map="cpu",
    ).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    dequantized = rules_of_bitsandbytes(tensors)
    bundle = load(tmp_path)
    same_t5(bundle, dequantized)
    assert "quantization_config" not in bundle.configs["t5"]
    # int8 becomes our leaf as it is; nf4 is rounded again, and the log warns of it.
    caplog.clear()
    eight = load(tmp_path, quantize={"t5": "int8"})
    kernels = lora.kernels(eight.variables["t5"]["params"])
    wanted = lora.kernels(bundle.variables["t5"]["params"])
    paths = quantization.quantizable_paths(bundle.variables["t5"]["params"])
    exact = bits == 8
    for path in paths - {("stack", "blocks", "wo")}:  # T5's wo stays in floats
        assert isinstance(kernels[path], Int8)
        error = np.abs(kernels[path].array() - wanted[path]).max()
        assert error <= np.abs(wanted[path]).max() * (1e-6 if exact else 1 / 127)
        assert exact or error > 1e-4
    assert ("rounded a second time (nf4 (double) to int8)" in caplog.text) != exact
    if exact:
        q = np.asarray(kernels[("stack", "blocks", "to_out")].q[1])  # (h, d, outputs)
        name = "encoder.block.1.layer.0.SelfAttention.o.weight"
        wanted = tensors[name].numpy().T
        np.testing.assert_array_equal(q.reshape(wanted.shape), wanted)


def four_bit_denoiser():
    """{key: tensor} of the denoiser's blocks in nf4, and all of it dequantized."""
    stored, dequantized = {}, {}
    for key, x in denoiser().items():
        if x.ndim == 2 and key.startswith("joint_blocks") and key.endswith(".weight"):
            packed, state = bitsandbytes.functional.quantize_4bit(
                x, blocksize=64, quant_type="nf4"
            )
            stored[key] = packed
            parts = state.as_dict(packed=True).items()
            stored |= {f"{key}.{part}": value for part, value in parts}
            x = bitsandbytes.functional.dequantize_4bit(packed, state)
        stored.setdefault(key, x)
        dequantized[key] = x
    return stored, dequantized


def their_velocity(state):
    """PyTorch's velocity of weights in Stability's names."""
    from diffusers.loaders import single_file_utils

    state = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(
        dict(state)
    )
    config = diffusers.SD3Transformer2DModel.load_config(FOLDER)
    model = diffusers.SD3Transformer2DModel.from_config(config)
    model.load_state_dict(state)
    return run_theirs(model.eval(), *INPUTS)


def test_a_single_file_in_nf4(tmp_path):
    stored, dequantized = four_bit_denoiser()
    path = tmp_path / "nf4.safetensors"
    stored = {PREFIX + k: x.contiguous() for k, x in stored.items()}
    safetensors.torch.save_file(stored, path)
    bundle = load(path)
    assert convert.error(velocity(bundle), their_velocity(dequantized)) < 1e-4
    key = f"{PREFIX}joint_blocks.1.x_block.attn.qkv.weight"
    del stored[f"{key}.absmax"]
    safetensors.torch.save_file(stored, path)
    with pytest.raises(UserError, match=f"{key}.absmax is missing"):
        load(path)


# ComfyUI's scaled fp8


def scaled(state, keys):
    """{key: tensor} with `keys` in scaled fp8, and all of it dequantized."""
    stored, dequantized = {}, {}
    for key, x in state.items():
        if key in keys:
            scale = x.abs().max() / 448
            stored[key.removesuffix("weight") + "scale_weight"] = scale
            x = (x / scale).to(torch.float8_e4m3fn)
            stored[key], x = x, x.float() * scale
        stored.setdefault(key, x)
        dequantized[key] = x
    return stored, dequantized


@pytest.fixture(scope="module")
def scaled_file(tmp_path_factory):
    """Denoiser and T5 in one file, as sd3.5_large_fp8_scaled has them."""
    state = denoiser()
    blocks = {k for k, x in state.items() if k.startswith("joint") and x.ndim == 2}
    stored, dequantized = scaled(state, blocks)
    stored |= {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    words = miniature.t5().state_dict()
    words.pop("encoder.embed_tokens.weight")
    layers = {k for k, x in words.items() if "block" in k and x.ndim == 2}
    t5, t5_dequantized = scaled(words, {k for k in layers if "bias" not in k})
    t5 |= {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    path = tmp_path_factory.mktemp("scaled") / "sd3.5_fp8_scaled.safetensors"
    whole = {PREFIX + k: x.contiguous() for k, x in stored.items()}
    whole |= {f"text_encoders.t5xxl.transformer.{k}": x for k, x in t5.items()}
    safetensors.torch.save_file(whole, path)
    return path, dequantized, t5_dequantized


def test_a_file_in_scaled_fp8(scaled_file):
    path, dequantized, t5 = scaled_file
    bundle = load(path)
    assert convert.error(velocity(bundle), their_velocity(dequantized)) < 1e-4
    same_t5(bundle, t5)


@pytest.mark.parametrize("devices", [1, 2])
def test_scaled_fp8_becomes_our_leaf_without_rounding(devices, scaled_file, caplog):
    caplog.set_level(logging.INFO)
    path, *_ = scaled_file
    plain = load(path).variables["denoiser"]["params"]
    both = {"denoiser": "fp8", "t5": "fp8"}
    eight = load(path, devices=devices, quantize=both).variables["denoiser"]["params"]
    kernels, wanted = lora.kernels(eight), lora.kernels(plain)
    for name in quantization.quantizable_paths(plain):
        assert isinstance(kernels[name], Float8)
        np.testing.assert_allclose(kernels[name].array(), wanted[name], rtol=1e-6)
    assert "as fp8 with the file's scales" in caplog.text
    assert "rounded" not in caplog.text
    load(path, quantize={"denoiser": "int8"})
    assert "rounded a second time (scaled float8_e4m3fn to int8)" in caplog.text


# Jobs


def job(name, tmp_path, **flags):
    recipe = [name, "--config=configs/released.py:tiny", f"--workdir={tmp_path}"]
    return main.main([*recipe, *(f"--config.{k}={x}" for k, x in flags.items())])


def test_convert_makes_a_diffusers_folder_of_a_gguf_file(gguf_file, tmp_path):
    assert job("convert", tmp_path, weights=gguf_file) == 0
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / "diffusers" / "transformer"
    )
    wanted = run_theirs(theirs.eval(), *INPUTS)
    assert convert.error(velocity(load(gguf_file)), wanted) < 1e-4


def test_compare_refuses_quantized_files(gguf_file, scaled_file, tmp_path, capsys):
    for path in gguf_file, scaled_file[0]:
        assert job("compare", tmp_path, weights=path) == 2
        error = capsys.readouterr().err
        assert "compare reads plain weights with PyTorch, and these are" in error


def test_sample_takes_gguf_files(gguf_file, tmp_path, capsys):
    t5_gguf(tmp_path / "t5.gguf")
    sources = miniature.folder(KIND), gguf_file, tmp_path / "t5.gguf"
    flags = {"weights": ",".join(map(str, sources)), "sample.prompt": "a red fox"}
    assert job("sample", tmp_path, **flags) == 0
    data = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    flags["weights"] = tmp_path / "cut.gguf"
    assert job("sample", tmp_path, **flags) == 2
    assert "it was not copied whole, copy it again" in capsys.readouterr().err
