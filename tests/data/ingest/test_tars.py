"""WebDataset's tars as tarfile writes them, and tars that nobody should write."""

import bz2
import gzip
import io
import lzma
import tarfile
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd3_jax.data.ingest import input_parts, tars
from sd3_jax.data.ingest.items import read_at
from sd3_jax.data.ingest.tars import BadTar
from sd3_jax.errors import UserError

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
LONG = 100 * "f" + "/" + 80 * "a" + "ü"
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=300)


def packed(*entries, format=tarfile.PAX_FORMAT):
    """A tar of (name, data), or (name, data, changes to its TarInfo)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data, *changes in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in (changes[0] if changes else {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name=b"x.jpg", size=b"00000000000\0", kind=b"0"):
    """By hand: tarfile would not write it."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124:136], block[156:157] = size, kind
    block[257:265] = b"ustar\0" + b"00"
    block[148:156] = 8 * b" "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(1024)
PAIR = [("a/1.jpg", b"\xff\xd8 picture"), ("a/1.txt", b"a red fox")]


@pytest.fixture
def put(tmp_path):
    def put(data):
        (tmp_path / "x.tar").write_bytes(data)
        return tmp_path / "x.tar"

    return put


def taken(path):
    """(key, extension, data) of the members that are taken; the others by reason."""
    places = list(tars.members(path))
    members = [
        (place.key, place.extension, read_at(str(path), place.start, place.size))
        for place in places
        if not place.reason
    ]
    return members, dict(Counter(place.reason for place in places if place.reason))


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes_is_read(put, format):
    data = [*PAIR, ("./b/2.Cls.JPG", b""), (f"{LONG}.jpg", 600 * b"x"), ("3.txt", b"3")]
    members, skipped = taken(put(packed(*data, format=format)))
    assert members == [
        ("a/1", "jpg", b"\xff\xd8 picture"),
        ("a/1", "txt", b"a red fox"),
        (LONG, "jpg", 600 * b"x"),
        ("3", "txt", b"3"),
    ]
    assert skipped == {"another extension": 1}


SKIPPED = {
    "symbolic link": ("x.jpg", b"", dict(type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": ("x.jpg", b"", dict(type=tarfile.LNKTYPE, linkname="a/1.jpg")),
    "device": ("x.jpg", b"", dict(type=tarfile.CHRTYPE)),
    "FIFO": ("x.jpg", b"", dict(type=tarfile.FIFOTYPE)),
    "folder": ("x.jpg", b"", dict(type=tarfile.DIRTYPE)),
    "unknown type": ("x.jpg", b"data", dict(type=b"Z")),
    "sparse file": (
        "x.jpg",
        b"1\n0\n4\n",
        dict(pax_headers={"GNU.sparse.major": "1", "GNU.sparse.realsize": str(2**62)}),
    ),
    "more than 100 bytes": ("x.jpg", bytes(101)),
    "another extension": ("x.exe", b"MZ"),
    "an odd name": (".jpg", b""),
    "an odd name ": ("", b""),
    "an odd name  ": ("a\nb.jpg", b""),
    "an odd name   ": ("a\u202egpj.jpg", b""),
    "an odd name    ": ("\udcff.jpg", b""),
    "an odd name     ": (300 * "a" + ".jpg", b""),
    "a name that leads out of its folder": ("../x.jpg", b""),
    "a name that leads out of its folder ": ("/etc/x.jpg", b""),
    "a name that leads out of its folder  ": ("a/../../x.jpg", b""),
    "a name that leads out of its folder   ": ("..\\x.jpg", b""),
    "a name that leads out of its folder    ": ("C:/x.jpg", b""),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_is_no_sample_is_skipped_and_counted(put, reason, monkeypatch):
    monkeypatch.setattr(tars, "MEMBER", 100)
    path = put(packed(SKIPPED[reason], SKIPPED[reason], *PAIR))
    members, skipped = taken(path)
    assert [member[:2] for member in members] == [("a/1", "jpg"), ("a/1", "txt")]
    assert skipped == {reason.strip(): 2}
    assert [p.name for p in path.parent.iterdir()] == ["x.tar"]


whole = packed(*PAIR)
huge = header(size=b"\x80" + (2**62).to_bytes(11))
DAMAGED = {
    "nothing": (b"", "at its start: cut off after it"),
    "text": (600 * b"x", "no tar header after it; expected a plain tar"),
    "compressed": (gzip.compress(bytes(10**6)), "is compressed by gzip; expected"),
    "half a header": (whole[:700], "at a/1.jpg: cut off after it"),
    "half a member": (whole[:516], "at a/1.jpg: 10 bytes, of which 4 could be read"),
    "no end": (whole[:2048], "at a/1.txt: cut off after it"),
    "garbage between": (whole[:1024] + 600 * b"x" + whole[1024:], "at a/1.jpg: no tar"),
    "a flipped bit": (whole[:1030] + b"\x80" + whole[1031:], "at a/1.jpg: no tar"),
    "huge": (huge + END, f"at x.jpg: {2**62} bytes, of which 1024 could be read"),
    "negative": (header(size=b"\xff" * 11 + b"\0") + END, "no tar header"),
    "a long name that is huge": (header(b"n", huge[124:136], b"L"), "at its start:"),
    "a name of a megabyte": (
        header(b"n", b"00010000000\0", b"L") + bytes(2**21) + END,
        "a name of 2097152 bytes after it",
    ),
    "a size with a sign": (header(size=b"       -512\0") + END, "no tar header"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tar_is_one_line_with_file_and_member(put, case):
    data, words = DAMAGED[case]
    path = put(data)
    with pytest.raises(BadTar) as caught:
        list(tars.members(path))
    told = str(caught.value)
    assert told.startswith(f"{path}: ") and words in told and told.isprintable()


def test_what_came_before_the_damage_is_given(put):
    places = tars.members(put(whole[:1536]))
    assert next(places).key == "a/1"
    with pytest.raises(BadTar, match="at a/1.txt"):
        next(places)


PACKERS = {"gzip": gzip.compress, "xz": lzma.compress, "bzip2": bz2.compress}
PACKERS["zstd"] = lambda data: b"\x28\xb5\x2f\xfd" + data


@pytest.mark.parametrize("name", ["x.tar", "x.tgz", "x.tar.gz"])
@pytest.mark.parametrize("program", PACKERS)
def test_a_compressed_tar_is_refused_with_the_way_to_unpack_it(tmp_path, program, name):
    path = tmp_path / name
    path.write_bytes(PACKERS[program](whole))
    with pytest.raises(UserError) as caught:
        input_parts.plan([str(path)])
    assert str(caught.value) == (
        f"{path}: is compressed by {program}; expected a plain tar: unpack it with"
        f" {program} -dc {path} > {tmp_path}/x.plain.tar"
    )


def test_a_path_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.tar", tmp_path):
        with pytest.raises(BadTar, match="cannot be read"):
            list(tars.members(path))


many = packed(
    *PAIR, (f"{LONG}.jpg", bytes(50)), SKIPPED["symbolic link"], ("2.txt", b"2")
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "x.tar"


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, len(many) - 1), st.integers(0, 255)), max_size=5),
    st.integers(0, len(many)) | st.just(len(many)),
)
def test_damage_gives_members_or_a_bad_tar(scratch, changes, end):
    damaged = bytearray(many)
    for place, value in changes:
        damaged[place] = value
    scratch.write_bytes(damaged[:end])
    try:
        for key, extension, _ in taken(scratch)[0]:
            assert key.isprintable() and ".." not in key.split("/")
            assert extension in tars.EXTENSIONS
    except BadTar as error:
        assert str(error).isprintable()


@QUICK
@given(
    st.binary(max_size=20),
    st.sampled_from([b"0", b"5", b"1", b"x", b"g", b"L", b"K", b"S", b"\0", b"?"]),
    st.binary(min_size=12, max_size=12)
    | st.integers(0, 2000).map(lambda n: b"%011o\0" % n),
    st.binary(max_size=600),
)
def test_any_header_with_a_true_checksum(scratch, name, kind, size, data):
    scratch.write_bytes(header(name, size, kind) + data.ljust(2048, b"\0") + whole)
    try:
        list(tars.members(scratch))
    except BadTar as error:
        assert str(error).isprintable()
