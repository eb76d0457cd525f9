"""Our reader and writer against the library's, and files that lie."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as library

from sd3_jax.errors import UserError
from sd3_jax.weights import safetensors
from sd3_jax.weights.safetensors import Entry, open_file, open_folder

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4, dtype=np.float16),
    "c.weight": np.array([[1.5, -2.0]], ml_dtypes.bfloat16),
    "scalar": np.array(7, np.int64),
    "none": np.zeros((0, 3), np.float32),
}


def entries(arrays):
    return {k: Entry(x.dtype, x.shape, lambda x=x: x) for k, x in arrays.items()}


def test_what_the_library_writes_is_read(tmp_path):
    library.save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"key": "value"})
    tensors, metadata = open_file(tmp_path / "x.safetensors")
    assert metadata == {"key": "value"}
    for name, x in ARRAYS.items():
        read = tensors[name].read()
        assert read.dtype == x.dtype and read.tobytes() == x.tobytes()
        assert tensors[name].shape == x.shape


def test_what_we_write_the_library_reads(tmp_path):
    safetensors.write_file(tmp_path / "x.safetensors", entries(ARRAYS))
    read = library.load_file(tmp_path / "x.safetensors")
    assert read.keys() == ARRAYS.keys()
    assert all(read[k].tobytes() == x.tobytes() for k, x in ARRAYS.items())
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_eight_bit_floats(tmp_path):
    x = {"w": np.array([0.5, -448, 3], ml_dtypes.float8_e4m3fn)}
    safetensors.write_file(tmp_path / "x.safetensors", entries(x))
    read = open_file(tmp_path / "x.safetensors")[0]["w"].read()
    assert read.astype(np.float32).tolist() == [0.5, -448, 3]


def test_a_folder_of_several_files_and_their_index(tmp_path):
    safetensors.write_folder(tmp_path, entries(ARRAYS), "model", shard=24)
    assert len(list(tmp_path.glob("*-of-00002.safetensors"))) == 2
    tensors = open_folder(tmp_path)
    assert all(tensors[k].read().tobytes() == x.tobytes() for k, x in ARRAYS.items())


def test_the_plain_name_comes_before_a_variant(tmp_path):
    for name, value in ("model.fp16", 1), ("model", 2):
        x = {"w": np.array([value], np.float32)}
        safetensors.write_file(tmp_path / f"{name}.safetensors", entries(x))
    assert open_folder(tmp_path)["w"].read() == [2]
    (tmp_path / "model.safetensors").unlink()
    assert open_folder(tmp_path)["w"].read() == [1]


def file(header, data=b"", size=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if size is None else size
    return size.to_bytes(8, "little") + text + data


def one(**changes):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return {"w": entry}


LIES = {
    "empty": (b"", "header of 0 bytes"),
    "short": (b"\1\0\0", "header of 1 bytes"),
    "huge header": (file(b"{}", size=2**60), "in a file of 10"),
    "no json": (file(b"{nope"), "its header"),
    "a list": (file([1, 2]), "its header"),
    "deep": (file(b"[" * 100_000), "its header"),
    "unknown dtype": (file(one(dtype="F31"), bytes(8)), "F31"),
    "negative size": (file(one(shape=[-2]), bytes(8)), "does not take"),
    "float size": (file(one(shape=[2.0]), bytes(8)), "its header"),
    "true as a size": (file(one(shape=[True, 2]), bytes(8)), "does not take"),
    "too few bytes": (file(one(shape=[3]), bytes(8)), "does not take"),
    "offsets turned": (file(one(data_offsets=[8, 0]), bytes(8)), "does not take"),
    "beyond the end": (file(one(data_offsets=[0, 8]), bytes(4)), "its header says"),
    "bytes left over": (file(one(), bytes(9)), "its header says"),
    "a gap": (file(one(data_offsets=[8, 16]), bytes(16)), "gap"),
    "overlap": (
        file(one() | {"v": one(data_offsets=[4, 12])["w"]}, bytes(12)),
        "overlap",
    ),
    "overflow": (file(one(shape=[2**62, 4]), bytes(8)), "does not take"),
    "no entry": (file({"w": 3}), "its header"),
    "a zip": (b"PK\x03\x04" + bytes(100), "is a pickle"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(100), "is a pickle"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_is_refused_in_one_line(case, tmp_path):
    data, words = LIES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        open_file(path)
    assert str(path) in str(caught.value) and words in str(caught.value)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3])
def test_an_index_names_only_its_neighbours(name, tmp_path):
    index = {"weight_map": {"w": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not an index"):
        open_folder(tmp_path)


def test_an_index_of_missing_files(tmp_path):
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not there"):
        open_folder(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="is a pickle"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no .safetensors"):
        open_folder(tmp_path / "..")
