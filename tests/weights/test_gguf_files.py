"""GGUF files as other tools write them, against the gguf package; files that lie."""

import gguf
import numpy as np
import pytest
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.weights import gguf_files, model_files, safetensors, single_file
from sd3_jax.weights.stored_tensor import Tensor

TYPES = gguf.GGMLQuantizationType
WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# gguf-py dequantizes these and does not quantize: random blocks are as good.
K = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
MORE = ("IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M", "TQ1_0", "MXFP4")


def blocks(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Rows of random bytes whose float16 numbers are finite."""
    numbers, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, width // numbers, size))
    # Bit 6 of a float16's upper byte belongs to its exponent: without it, wherever the
    # format has its scales, they are finite.
    return (raw & 0xBF).astype(np.uint8).reshape(rows, -1)


def write(path, tensors, arch="sd3", fields=()):
    """A file of {name: (array, type)}, where raw bytes may stand for the values."""
    writer = gguf.GGUFWriter(path, arch or "x")
    for add, *values in fields:
        getattr(writer, add)(*values)
    for name, (x, kind) in tensors.items():
        writer.add_tensor(name, x, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return epath.Path(path)


def quantized(x, kind):
    return gguf.quantize(x, TYPES[kind]), kind


@pytest.mark.parametrize("kind", WRITTEN)
def test_types_that_the_package_writes(kind, tmp_path):
    x = np.random.default_rng(1).standard_normal((40, 96)).astype(np.float32)
    raw, _ = quantized(x, kind)
    path = write(tmp_path / "a.gguf", {"w": (raw, kind), "b": quantized(x[0], "F32")})
    tensors, _ = model_files.open_file(path)
    read = tensors["w"].read().astype(np.float32)
    wanted = gguf.dequantize(raw, TYPES[kind])
    np.testing.assert_array_equal(read, wanted)
    np.testing.assert_array_equal(tensors["b"].read(), x[0])
    assert tensors["w"].shape == (40, 96) and np.abs(read - x).max() < 0.5
    # Types that are arrays as they are stay in their dtype.
    assert isinstance(tensors["w"], Tensor) == (kind in ("F32", "F16", "BF16"))


@pytest.mark.parametrize("kind", K + MORE)
def test_types_that_it_only_reads(kind, tmp_path):
    raw = blocks(kind, 40, 512)
    path = write(tmp_path / "a.gguf", {"w": (raw, kind)})
    tensor = gguf_files.open_file(path)["w"]
    assert tensor.shape == (40, 512) and tensor.form == kind
    wanted = gguf.dequantize(raw, TYPES[kind])
    assert np.isfinite(wanted).all() and wanted.any()
    np.testing.assert_array_equal(tensor.read(), wanted)


def test_a_tensor_is_dequantized_in_pieces(tmp_path, monkeypatch):
    raw = blocks("Q4_K", 50, 512)
    path = write(tmp_path / "a.gguf", {"w": (raw, "Q4_K")})
    monkeypatch.setattr(gguf_files, "BLOCK", 7 * 512)
    sizes, original = [], gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda x, kind: sizes.append(len(x)) or original(x, kind)
    )
    read = gguf_files.open_file(path)["w"].read()
    np.testing.assert_array_equal(read, original(raw, TYPES.Q4_K))
    assert sizes[-8:] == [7] * 7 + [1]


def test_shapes_of_other_tools(tmp_path):
    """ComfyUI-GGUF notes a shape that it changed; ggml drops leading axes of 1."""
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    key = "x_embedder.proj.weight"
    note = ("add_array", f"comfy.gguf.orig_shape.{key}", (256, 16, 2, 2))
    tensors = {key: quantized(x, "Q8_0"), "pos_embed": quantized(x, "F16")}
    path = write(tmp_path / "a.gguf", tensors, fields=[note])
    read = gguf_files.open_file(path)
    wanted = gguf.dequantize(tensors[key][0], TYPES.Q8_0).reshape(256, 16, 2, 2)
    np.testing.assert_array_equal(read[key].read(), wanted)
    assert read["pos_embed"].read().shape == (1, 64, 256)
    for bad in (256, 16, 2, 3), (-256, 16, -2, 2):
        note = ("add_array", f"comfy.gguf.orig_shape.{key}", bad)
        path = write(tmp_path / "b.gguf", tensors, fields=[note])
        assert f"says {[*bad]}; the file is damaged" in refusal(path)


def test_a_header_between_other_things(tmp_path):
    """A tokenizer in the fields, an alignment, and names of a whole model."""
    x = np.ones((2, 32), np.float32)
    fields = [
        ("add_custom_alignment", 64),
        ("add_token_list", [f"word{i}" for i in range(300)]),
        ("add_token_scores", [0.5] * 300),
        ("add_bool", "tokenizer.ggml.add_bos_token", True),
    ]
    names = "model.diffusion_model.joint_blocks.0.w", "first_stage_model.decoder.mid.w"
    tensors = {name: quantized(i * x, "Q8_0") for i, name in enumerate(names, 1)}
    path = write(tmp_path / "a.gguf", tensors, "pig", fields)
    parts = single_file.split(path, gguf_files.open_file(path))
    assert set(parts) == {"denoiser", "vae"}
    np.testing.assert_allclose(
        parts["vae"].tensors["decoder.mid.w"].read(), 2 * x, rtol=1e-2
    )


def test_t5_in_llama_cpps_names():
    """Against gguf-py's own table of names, in the other direction."""
    model = gguf.MODEL_ARCH.T5ENCODER
    table = gguf.get_tensor_name_map(model, 3)
    layer, mlp = "encoder.block.2.layer.0", "encoder.block.2.layer.1.DenseReluDense"
    names = [
        "shared.weight",
        "encoder.final_layer_norm.weight",
        *(f"{layer}.SelfAttention.{x}.weight" for x in "qkvo"),
        f"{layer}.SelfAttention.relative_attention_bias.weight",
        f"{layer}.layer_norm.weight",
        "encoder.block.2.layer.1.layer_norm.weight",
        *(f"{mlp}.{x}.weight" for x in ("wi_0", "wi_1", "wo")),
    ]
    for name in names:
        llama = table.get_name(name, try_suffixes=(".weight",))
        assert gguf_files._t5_name(llama) == name, llama
    decoder = gguf_files._t5_name("dec.blk.1.cross_attn_q.weight")
    assert single_file.place(decoder) == ("t5", decoder)
    assert decoder.startswith("decoder.")


def test_a_tensor_under_two_names(tmp_path):
    x = np.ones((4, 8), np.float32)
    tensors = {"token_embd.weight": (x, "F32"), "shared.weight": (2 * x, "F32")}
    path = write(tmp_path / "a.gguf", tensors, "t5")
    assert "shared.weight appears twice, under two names" in refusal(path)


# Files that lie, or are of something else


def refusal(path, name=None) -> str:
    with pytest.raises(UserError) as caught:
        model_files.open_file(path)
    message = str(caught.value)
    assert message.isprintable() and str(path) in message and len(message) < 400
    return message


ONE = {"joint_blocks.0.w": (np.ones((4, 64), np.float32), "F32")}


@pytest.mark.parametrize("arch", ["llama", "flux", "qwen2vl"])
def test_another_architecture_is_named(arch, tmp_path):
    path = write(tmp_path / "a.gguf", ONE, arch)
    assert f'of the architecture "{arch}": expected sd3, or t5' in refusal(path)


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    raw = np.zeros((2, 2 * gguf.GGML_QUANT_SIZES[TYPES.Q8_K][1]), np.uint8)
    path = write(tmp_path / "a.gguf", {"w": (raw, "Q8_K")})
    assert "w is of GGUF type Q8_K, which the gguf package cannot" in refusal(path)
    data = path.read_bytes()
    kind = TYPES.Q8_K.to_bytes(4, "little") + bytes(8)  # type and offset
    (tmp_path / "b.gguf").write_bytes(data.replace(kind, b"\x63" + kind[1:]))
    assert "is of GGUF type 99, which the gguf package does not" in refusal(
        epath.Path(tmp_path / "b.gguf")
    )


def test_an_axis_of_no_numbers(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": (blocks("Q8_0", 4, 64), "Q8_0")})
    sizes = (64).to_bytes(8, "little") + (4).to_bytes(8, "little")
    for new in bytes(8) + sizes[8:], sizes[:8] + bytes(8):
        (tmp_path / "b.gguf").write_bytes(path.read_bytes().replace(sizes, new))
        told = refusal(epath.Path(tmp_path / "b.gguf"))
        assert "of Q8_0, which has blocks of 32; the file is damaged" in told


def test_a_file_cut_off_anywhere(tmp_path):
    path = write(tmp_path / "a.gguf", {"w": quantized(np.ones((4, 64)), "Q8_0")})
    data = path.read_bytes()
    for length in (*range(4, len(data) - 10, 23), len(data) - 30):
        path.write_bytes(data[:length])
        assert "copy it again" in refusal(path)


def test_a_part_of_a_split_model(tmp_path):
    path = write(tmp_path / "a-00001-of-00002.gguf", ONE)
    assert "is one of 2 parts of a GGUF file; join them with" in refusal(path)
    field = ("add_uint16", "split.count", 3)
    path = write(tmp_path / "a.gguf", ONE, fields=[field])
    assert "is one of 3 parts" in refusal(path)


LIES = {
    "version": (b"GGUF\1\0\0\0" + bytes(40), "version 1, expected"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(40), "version 3 in big-endian order"),
    "counts": (b"GGUF\3\0\0\0" + b"\xff" * 16, "tensors, expected"),
    "a text": (
        b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"\xff" * 8,
        "bytes of a text",
    ),
    "empty": (b"GGUF\3\0\0\0" + bytes(16), "without tensors"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(case, tmp_path):
    data, words = LIES[case]
    path = epath.Path(tmp_path / "a.gguf")
    path.write_bytes(data)
    assert words in refusal(path)


def test_adapters_are_no_gguf_files(tmp_path):
    path = write(tmp_path / "lora.gguf", ONE)
    with pytest.raises(UserError, match="is a GGUF file: expected the .safetensors"):
        safetensors.open_file(path)
