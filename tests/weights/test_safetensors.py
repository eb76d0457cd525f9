"""Our reader and writer against the library's, and files that lie."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as library

from sd3_jax.data import float_bits
from sd3_jax.data.float_bits import finite
from sd3_jax.errors import UserError
from sd3_jax.weights import safetensors, sources
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
    "empty": (b"", "is empty; copy it again"),
    "cut in the header": (file(one())[:30], "a header of 61 bytes in a file of 30: it"),
    "short": (b"\1\0\0", "header of 1 bytes"),
    "huge header": (file(b"{}", size=2**60), "in a file of 10"),
    "no json": (file(b"{nope"), "its header"),
    "a list": (file([1, 2]), "its header"),
    "deep": (file(b"[" * 100_000), "its header"),
    "unknown dtype": (file(one(dtype="F31"), bytes(8)), "F31"),
    "negative size": (file(one(shape=[-2]), bytes(8)), "w: shape [-2]"),
    "float size": (file(one(shape=[2.0]), bytes(8)), "its header"),
    "true as a size": (file(one(shape=[True, 2]), bytes(8)), "shape [True, 2]"),
    "too few bytes": (file(one(shape=[3]), bytes(8)), "does not fit bytes"),
    "offsets turned": (file(one(data_offsets=[8, 0]), bytes(8)), "does not fit bytes"),
    "beyond the end": (file(one(), bytes(4)), "says 77: it was not copied whole"),
    "bytes left over": (file(one(), bytes(9)), "its header says"),
    "a gap": (file(one(data_offsets=[8, 16]), bytes(16)), "gap"),
    "overlap": (
        file(one() | {"v": one(data_offsets=[4, 12])["w"]}, bytes(12)),
        "overlap",
    ),
    "overflow": (file(one(shape=[2**62, 4]), bytes(8)), "w: shape"),
    "an empty overflow": (
        file(one(shape=[0, 2**60], data_offsets=[0, 0])),
        "w: shape [0, 1152921504606846976]",
    ),
    "many axes": (file(one(shape=[1] * 9, data_offsets=[0, 4]), bytes(4)), "8 sizes"),
    "a shape that is text": (file(one(shape="22"), bytes(8)), "w: shape 22"),
    "offsets that are text": (
        file(one(data_offsets="08"), bytes(8)),
        "data_offsets 08",
    ),
    "three offsets": (file(one(data_offsets=[0, 4, 8]), bytes(8)), "start and end"),
    "a dtype that is a list": (file(one(dtype=["F32"]), bytes(8)), "dtype ['F32']"),
    "no entry": (file({"w": 3}), "w: expected its dtype"),
    "a name twice": (
        file(b'{"w":%s,"w":%s}' % (2 * (json.dumps(one()["w"]).encode(),)), bytes(8)),
        '"w" appears twice',
    ),
    "a field twice": (
        file(b'{"w":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}'),
        '"dtype" appears twice',
    ),
    "nan as a size": (file(one(shape=[float("nan")]), bytes(8)), "NaN is not JSON"),
    "infinity": (file(b'{"w": 1e999}'), "1e999 is too large"),
    "an endless number": (file(b'{"w": %s}' % (b"9" * 5000)), "its header"),
    "another encoding": (file("{}".encode("utf-16")), "its header"),
    "bytes that are no text": (file(b'{"\xff": 1}'), "its header"),
    "a name with a line": (file({"a\nb": one()["w"]}, bytes(8)), '"a\\nb": expected'),
    "a name with a NUL": (file({"a\0b": one()["w"]}, bytes(8)), '"a\\x00b": expected'),
    "half a character": (file(b'{"\\ud800": 1}'), '"\\ud800": expected'),
    "a name turned round": (file({"a\u202e": one()["w"]}, bytes(8)), '"a\\u202e"'),
    "a name of a page": (
        file({600 * "a": one()["w"]}, bytes(8)),
        "a printable name of",
    ),
    "metadata in numbers": (file({"__metadata__": {"a": 1}}), "__metadata__: expected"),
    "metadata in a list": (file({"__metadata__": []}), "__metadata__: expected"),
    "a header of 17 MB": (file(b"{}".ljust(17 * 2**20)), "a header of 17"),
    "a zip": (b"PK\x03\x04" + bytes(100), "is a zip archive: unpack it"),
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
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "", "..", "x.bin", "a\0.safetensors", 3]
)
def test_an_index_names_only_its_neighbours(name, tmp_path):
    index = {"weight_map": {"w": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="not an index"):
        open_folder(tmp_path)


def test_an_index_of_missing_files(tmp_path):
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="1 files, of which 1 are missing: model-0"):
        open_folder(tmp_path)


def test_every_missing_shard_is_told_before_one_is_opened(tmp_path):
    where = {str(i): f"model-{i:05d}-of-00020.safetensors" for i in range(1, 21)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / where["1"]).write_bytes(b"no tensors, but it is not looked at")
    with pytest.raises(UserError, match="20 files, of which 19 are missing") as caught:
        open_folder(tmp_path)
    told = str(caught.value)
    assert where["2"] in told and where["11"] in told and where["12"] not in told


def test_a_tensor_is_of_the_file_that_the_index_says(tmp_path):
    for i in (1, 2):
        x = {"w": np.full(1, i, np.float32), str(i): np.zeros(1, np.float32)}
        safetensors.write_file(tmp_path / f"{i}-of-2.safetensors", entries(x))
    where = {"w": "1-of-2.safetensors", "2": "2-of-2.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert open_folder(tmp_path)["w"].read() == [1]
    index.write_text(json.dumps({"weight_map": where | {"1": where["2"]}}))
    with pytest.raises(UserError, match="1 tensors are not in the files"):
        open_folder(tmp_path)


def test_a_folder_of_pickles_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match="is a pickle"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="no .safetensors"):
        open_folder(tmp_path / "..")


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "pytorch_model.bin"])
def test_a_pickle_is_refused_whatever_it_is_called(name, tmp_path):
    for data in (b"\x80\x02}q\x00.", b"PK\x03\x04" + b"archive/data.pkl"):
        for path in (tmp_path / name, tmp_path / "model.safetensors"):
            path.write_bytes(data + bytes(50))
            with pytest.raises(
                UserError, match="is a pickle, and loading one may run code"
            ):
                sources.parts(sources.resolve(str(path)))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"{name} is a pickle"):
        sources.parts(sources.resolve(str(tmp_path)))


@pytest.mark.parametrize("dtype", float_bits.BEYOND)
def test_what_is_finite_and_what_is_not(dtype):
    dtype = np.dtype(dtype)
    edges = [ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min, 0, -0.0, 1]
    x = np.array(edges * 100_000, dtype).reshape(5, -1)
    assert finite(x) and finite(x[:, :0])
    for value in (np.nan, np.inf, -np.inf, -np.nan):
        x[4, -1] = np.array(value, np.float32).astype(dtype)  # no infinity: NaN
        assert not finite(x)
    assert finite(np.arange(3)) and finite(np.ones(3, bool))


QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def bits(tensors):
    return {k: (t.dtype, t.shape, t.read().tobytes()) for k, t in tensors.items()}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    safetensors.write_file(path, entries(ARRAYS))
    return path, path.read_bytes(), bits(open_file(path)[0])


def opened(path, data):
    """The tensors, or None for a file that is refused in one line."""
    path.write_bytes(data)
    try:
        return bits(open_file(path)[0])
    except UserError as error:
        assert str(error).isprintable()


@QUICK
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_refused_or_a_file(scratch, data, sized):
    opened(scratch[0], len(data).to_bytes(8, "little") + data if sized else data)


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=3),
    st.none() | st.integers(0, 2000),
)
def test_a_damaged_file_has_the_tensors_of_whole_bytes_or_is_refused(
    scratch, changes, end
):
    path, data, whole = scratch
    damaged, head = bytearray(data), 8 + int.from_bytes(data[:8], "little")
    for place, value in changes:
        damaged[place % head] = value  # a header has no checksum; neither has the rest
    found = opened(path, bytes(damaged[:end]))
    if found is not None:
        assert sum(len(x) for _, _, x in found.values()) == len(data) - head
        changed = {k for k in found if found[k] != whole.get(k)}
        assert damaged[8:head] != data[8:head] or not changed


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda each: (
        st.lists(each, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "a"]), each, max_size=3)
    ),
    max_leaves=8,
)


@QUICK
@given(
    st.sampled_from([*ARRAYS, "__metadata__", "new"]),
    st.sampled_from(["dtype", "shape", "data_offsets", None]),
    JSON
    | st.sampled_from(["F32", "I32", "F16"])
    | st.lists(st.integers(0, 2**70) | st.integers(0, 50), max_size=3),
)
def test_an_edited_header_is_refused_or_a_file(scratch, key, field, value):
    path, data, whole = scratch
    head = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:head])
    if field is None:
        header[key] = value
    else:
        header.setdefault(key, {})[field] = value
    found = opened(path, file(header, data[head:]))
    if found is not None:  # the others are what they were
        assert all(found[k] == whole[k] for k in found.keys() - {key})
        assert whole.keys() - {key} <= found.keys()


def filled(value):
    return entries(dict.fromkeys("ab", np.full((4, 4), value, np.float32)))


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("sizes", [(80, 10**9), (10**9, 80), (80, 130)])
def test_a_second_save_leaves_nothing_of_the_first(tmp_path, stem, sizes):
    for value, shard in enumerate(sizes):
        safetensors.write_folder(tmp_path, filled(value), stem, shard)
    assert safetensors.open_folder(tmp_path)["b"].read()[0, 0] == 1
    names = {path.name for path in tmp_path.iterdir()}
    whole = {f"{stem}.safetensors"}
    assert names == whole or not names & whole


@pytest.mark.parametrize(
    "stem, wanted", [("model", "whole"), ("diffusion_pytorch_model", "shards")]
)
def test_of_a_whole_file_and_shards_each_library_has_its_own(tmp_path, stem, wanted):
    """diffusers asks for the index first, transformers for the whole file."""
    values = {"whole": 1, "shards": 2}
    safetensors.write_folder(tmp_path, filled(2), stem, 80)
    safetensors.write_file(tmp_path / f"{stem}.safetensors", filled(1))
    found = lambda: safetensors.open_folder(tmp_path)["b"].read()[0, 0]
    assert found() == values[wanted]
    for path in tmp_path.glob("*-of-*"):  # an index without its shards is left over
        path.unlink()
    assert found() == 1
