"""A record is the very example that was encoded, or a BadRecord, and nothing else."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3_jax.data import record_header, records
from sd3_jax.data.records import BadRecord, Record, clean, decode, encode

quick = settings(deadline=None, database=None, derandomize=True, max_examples=150)


def record(**changes) -> Record:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    tensors = {
        "latents": normal(2, 3, 4).astype(ml_dtypes.bfloat16),
        "moments": normal(1, 2, 6),
        "context": normal(3, 2),
        "pooled": normal(5).astype(np.float16),
    }
    where = (96, 64), (0, 8, 32, 48), "caption"
    return Record(tensors, "laion/17", "a red fox — 狐", *where)._replace(**changes)


WHOLE = encode(record())
HEADER = int.from_bytes(WHOLE[:8], "little")


def same(a: Record, b: Record) -> bool:
    equal = a._replace(tensors={}) == b._replace(tensors={})
    return (
        equal
        and a.tensors.keys() == b.tensors.keys()
        and all(
            (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())
            for x, y in ((a.tensors[k], b.tensors[k]) for k in a.tensors)
        )
    )


def pack(header, rest=WHOLE[8 + HEADER :]) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def header() -> dict:
    return json.loads(WHOLE[8 : 8 + HEADER])


def signed(changed: dict, rest=WHOLE[8 + HEADER :], kind="crc32") -> bytes:
    """A record with this header and a checksum to it: only what it says is wrong."""
    metadata = changed["__metadata__"]
    kinds = {
        k: (v["dtype"], v["shape"]) for k, v in changed.items() if k != "__metadata__"
    }
    tensors = {}
    for name, (dtype, shape) in kinds.items():
        start, end = changed[name]["data_offsets"]
        tensors[name] = np.frombuffer(rest[start:end], record_header.DTYPES[dtype])
        tensors[name] = tensors[name].reshape(shape)
    metadata["checksum"] = records._checksum(tensors, metadata, kind)
    return pack(changed, rest)


def test_a_record_comes_back_as_it_was():
    assert same(decode(WHOLE, "x:0"), record())
    bare = record(size=None, crop=None, caption="")
    assert same(decode(encode(bare), "x:0"), bare)
    turned = record()
    x = turned.tensors["context"]
    turned.tensors["context"] = np.asfortranarray(x)  # must not be written as it lies
    assert same(decode(encode(turned), "x:0"), record())


@pytest.mark.parametrize("name", record_header.PICTURES)
def test_one_form_of_a_picture_is_enough(name):
    x = np.ones((2, 3, 6), np.float32)
    if name == "image":
        x = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    made = Record({name: x}, "x", "a fox")
    assert same(decode(encode(made), "x:0"), made)


def test_the_first_version_is_read_still():
    first = header()
    first["__metadata__"].pop("caption_from")
    first["__metadata__"]["version"] = "1"
    for kind in "crc32", "sha256":
        assert same(decode(signed(first, kind=kind), "x:0"), record(caption_from=""))


def test_layout_is_no_matter():
    assert same(decode(pack(json.dumps(header(), indent=3).encode()), "x:0"), record())


# What is said of each fault: where, which field, what was found and wanted


def edit(*path, to):
    changed = header()
    at = changed
    for name in path[:-1]:
        at = at[name]
    if to is None:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return pack(changed)


def meta(name, to):
    return edit("__metadata__", name, to=to)


def resigned(name, to):
    changed = header()
    changed["__metadata__"][name] = to
    return signed(changed)


FAULTS = {
    "empty": (b"", "not a record: 0 bytes"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "not a record: a header of"),
    "huge header": ((2**40).to_bytes(8, "little") + bytes(99), "expected at most 99"),
    "header beyond": (
        pack(json.dumps(header()).encode() + b" " * record_header.HEADER),
        f"expected at most {record_header.HEADER}",
    ),
    "no json": (pack(b"{"), "its header"),
    "no utf-8": (pack(b'{"\xff": 1}'), "its header"),
    "utf-16": (pack(json.dumps(header()).encode("utf-16")), "its header"),
    "nested": (pack(b"[" * 100_000), "its header"),
    "a list": (pack([]), "no metadata"),
    "a name twice": (pack(b'{"__metadata__": {}, "__metadata__": {}}'), "twice"),
    "no metadata": (edit("__metadata__", to=None), "no metadata"),
    "a number": (meta("caption", 7), "'caption': 7, expected text"),
    "other format": (meta("format", "pt"), "format 'pt', expected \"sd3_jax.record\""),
    "no format": (meta("format", None), "format none"),
    "newer": (meta("version", "3"), "version 3 is newer than this code's, 2"),
    "odd version": (meta("version", "1.0"), "version: '1.0', expected \"2\""),
    "version 0": (meta("version", "0"), "version: '0'"),
    "no version": (meta("version", None), "version: ''"),
    "no caption": (meta("caption", None), "caption: missing"),
    "no source": (meta("source", None), "source: missing"),
    "no checksum": (meta("checksum", None), "checksum: missing"),
    "typo": (meta("captoin", "a"), "'captoin': unknown, expected one of format"),
    "another caption": (meta("caption", "a blue fox"), "checksum: "),
    "a name as a path": (edit("../../x", to={}), "'../../x': unknown"),
    "no text": (edit("context", to=None), "context: missing"),
    "clip beside context": (
        edit("clip", to={"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}),
        "context: stored whole and also as clip and t5",
    ),
    "odd moments": (edit("moments", "shape", to=[1, 4, 3]), "expected (h w 2c)"),
    "an image of floats": (
        edit("image", to={"dtype": "F32", "shape": [2, 2, 3], "data_offsets": [0, 48]}),
        "image: dtype 'F32', expected one of U8",
    ),
    "an image with alpha": (
        edit("image", to={"dtype": "U8", "shape": [2, 2, 4], "data_offsets": [0, 16]}),
        "image: shape [2, 2, 4], expected (h w 3)",
    ),
    "latents of bytes": (edit("latents", "dtype", to="U8"), "latents: dtype 'U8'"),
    "caption from two lines": (resigned("caption_from", "a\nb"), "caption_from: 'a"),
    "no entry": (edit("latents", to=[]), "latents: [], expected a tensor's entry"),
    "float64": (
        edit("context", "dtype", to="F64"),
        "context: dtype 'F64', expected one of F32, BF16, F16",
    ),
    "other dtype": (edit("pooled", "dtype", to="BF16"), "checksum"),
    "one axis": (
        edit("pooled", "shape", to=[5, 1]),
        "pooled: shape [5, 1], expected (e), each in [1, ",
    ),
    "shape 0": (edit("latents", "shape", to=[0, 3, 4]), "latents: shape [0, 3, 4]"),
    "shape true": (edit("latents", "shape", to=[True, 3, 4]), "latents: shape [True"),
    "shape 2.0": (edit("latents", "shape", to=[2.0, 3, 4]), "latents: shape [2.0"),
    "huge shape": (
        edit("pooled", "shape", to=[2**40]),
        "pooled: shape [1099511627776]",
    ),
    "turned": (edit("latents", "shape", to=[3, 2, 4]), "checksum"),
    "other size": (edit("latents", "shape", to=[3, 3, 4]), "not a record"),
    "overlap": (edit("pooled", "data_offsets", to=[0, 10]), "not a record"),
    "trailing": (WHOLE + b"\0", "not a record"),
    "flipped": (WHOLE[:-3] + bytes([WHOLE[-3] ^ 1]) + WHOLE[-2:], "checksum"),
    "no source name": (resigned("source", " "), "source: ' ', expected 1 to 1024"),
    "newline in source": (resigned("source", "a\nb"), "source: 'a\\nb'"),
    "size of one": (resigned("size", "[96]"), "size: '[96]', expected 2 integers"),
    "size 0": (resigned("size", "[0, 64]"), "size: (0, 64), expected pixels"),
    "size no json": (resigned("size", "x"), "size: 'x', expected 2 integers"),
    "crop outside": (
        resigned("crop", "[65, 8, 32, 48]"),
        "crop: (65, 8, 32, 48), expected a part of (96, 64)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named_in_one_line(name):
    data, words = FAULTS[name]
    with pytest.raises(BadRecord) as error:
        decode(data, "train-00003.arecord:41")
    text = str(error.value)
    assert text.startswith("train-00003.arecord:41: ") and words in text, text
    assert "\n" not in text and text.isprintable() and len(text) < 300


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", record().tensors)
def test_no_record_holds_what_is_not_finite(name, value):
    made = record()
    made.tensors[name].reshape(-1)[1] = value
    with pytest.raises(BadRecord, match=f"{name}: 1 of .* values are nan or infinite"):
        encode(made)
    with pytest.MonkeyPatch.context() as patch:  # as another's encoder would
        patch.setattr(records, "decode", lambda *_: None)
        data = encode(made)
    with pytest.raises(BadRecord, match=f"x:0: {name}: 1 of "):
        decode(data, "x:0")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(source=""), "source: ''"),
        (dict(source=None), "'None'"),
        (dict(source="\ud800"), "surrogates"),
        (dict(caption=b"caf\xe9"), "caption: not UTF-8"),
        (dict(caption="a\udcff"), "caption: not UTF-8"),
        (dict(size=None), "size: missing"),
        (dict(size=(96.5, 64)), "size: '[96.5, 64]'"),
        (
            dict(tensors={}),
            "latents: missing; a record needs it or one of image, moments",
        ),
        (dict(tensors={"pooled": np.zeros(2, np.float32)}), "latents: missing"),
        (dict(tensors={"latents": np.zeros((2, 2, 4))}), "dtype float64"),
        (dict(tensors={"latents": np.array("x", object)}), "dtype object"),
    ],
)
def test_nothing_is_written_that_would_not_be_read(changes, words):
    with pytest.raises(BadRecord) as error:
        encode(record(**changes))
    assert words in str(error.value)


# Captions


@pytest.mark.parametrize(
    "given, kept",
    [
        (None, ""),
        ("", ""),
        (" \n\t\u3000", ""),
        ("\x00\x07", ""),
        ("a\x00b\x1b[31mc\x85\x7f", "a b [31mc  "),
        ("a fox\n", "a fox"),
        ("a fox\r\n\r\n", "a fox"),
        ("a fox \u2029", "a fox "),
        ("two\nlines\tand\r\nmore", "two\nlines\tand \nmore"),
        ("狐 🦊 👩‍🚒", "狐 🦊 👩‍🚒"),
        ("café".encode(), "café"),
        ("é" * 1_000_000, "é" * records.CAPTION),
        (" " * records.CAPTION + "a", ""),
    ],
)
def test_what_is_kept_of_a_caption(given, kept):
    assert clean(given) == kept
    assert decode(encode(record(caption=given)), "x:0").caption == kept


@quick
@given(st.text() | st.binary())
def test_a_clean_caption_is_clean(text):
    try:
        kept = clean(text)
    except ValueError as error:
        assert "caption: not UTF-8" in str(error)
        return
    assert clean(kept) == kept and len(kept) <= records.CAPTION
    kept.encode()


# Fuzz: the example as it was, or a BadRecord


def read_or_refuse(data: bytes) -> bool:
    """Whether it was read; if so, it is the original, and another reader agrees."""
    try:
        found = decode(data, "x:0")
    except BadRecord:
        return False
    assert same(found, record())
    safetensors.deserialize(data)
    return True


@quick
@given(st.binary(max_size=300))
def test_random_bytes(data):
    assert not read_or_refuse(data)


@quick
@given(st.binary(max_size=200))
def test_a_random_header(text):
    assert not read_or_refuse(pack(text))


def test_every_bit_of_a_record():
    """All of them: the tensors' to the last are noticed, of the header what matters."""
    data = bytearray(WHOLE)
    for i in range(8 * len(data)):
        data[i // 8] ^= 1 << i % 8
        assert not (read_or_refuse(bytes(data)) and i >= 8 * (8 + HEADER))
        data[i // 8] ^= 1 << i % 8


@quick
@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_another_byte(place, byte):
    read_or_refuse(WHOLE[:place] + bytes([byte]) + WHOLE[place + 1 :])


@quick
@given(
    st.integers(0, len(WHOLE)), st.integers(0, 40), st.binary(max_size=40)
)  # cut, or put in, or both
def test_a_piece_that_is_missing_or_added(place, length, piece):
    read_or_refuse(WHOLE[:place] + piece + WHOLE[place + length :])


def test_truncation_anywhere():
    assert not any(read_or_refuse(WHOLE[:n]) for n in range(len(WHOLE)))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**70)
    | st.floats()
    | st.sampled_from(["F32", "BF16", "U8", "latents", "1", "", "[1, 1]"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner)
    ),
    max_leaves=6,
)


@settings(quick, max_examples=400)
@given(st.data())
def test_another_value_in_the_header(data):
    changed = header()
    at, name = changed, data.draw(st.sampled_from(sorted(changed)))
    if data.draw(st.booleans()):
        at, name = at[name], data.draw(st.sampled_from(sorted(at[name])))
    if data.draw(st.booleans()):
        name = data.draw(st.text(max_size=9))
    at[name] = data.draw(values)
    read_or_refuse(pack(changed))


def pair(shape=(2, 3, 3), **more) -> Record:
    rng = np.random.default_rng(1)
    image = lambda *shape: rng.integers(0, 256, shape, np.uint8)
    return Record(
        {"image": image(2, 3, 3), "rejected_image": image(*shape)} | more, "x"
    )


def test_a_preference_is_two_pictures_of_one_shape():
    assert same(decode(encode(pair()), "x:0"), pair())
    with pytest.raises(
        BadRecord, match=r"rejected_image: shape \[3, 2, 3\], expected that of"
    ):
        encode(pair((3, 2, 3)))
    with pytest.raises(BadRecord, match="latents: missing, but rejected_latents"):
        encode(pair(rejected_latents=np.ones((2, 3, 4), np.float32)))
