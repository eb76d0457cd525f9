"""Folders, tars and parquet files of other hands: each file accounted for once."""

import builtins
import datetime
import io
import json
import os
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sd3_jax import files
from sd3_jax.data import images
from sd3_jax.data.ingest import input_parts, items
from sd3_jax.data.ingest.input_parts import BadItem, Item, Part, Rejected
from sd3_jax.errors import UserError

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def picture(shade=0, kind="PNG"):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(data, kind)
    return data.getvalue()


def put(folder, files):
    """Files by name; what is None is a folder."""
    for name, data in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = data.encode() if isinstance(data, str) else data
        path.mkdir() if data is None else path.write_bytes(data)
    return str(folder)


def through(part):
    """As another host gets it."""
    again = Part(**json.loads(json.dumps(part._asdict())))
    assert again == part
    return again


def ingested(*inputs, size=4096):
    """Items and rejected ones by source, none of which appears twice."""
    parts = input_parts.plan([str(each) for each in inputs], size=size)
    found = [each for part in parts for each in input_parts.items(through(part))]
    assert max(Counter(each.source for each in found).values(), default=1) == 1
    assert all(each.reason.isprintable() for each in found if is_rejected(each))
    kept = {each.source: each for each in found if not is_rejected(each)}
    return kept, {each.source: each.reason for each in found if is_rejected(each)}


def is_rejected(each):
    return isinstance(each, Rejected)


def columns(found):
    return {source: item.columns for source, item in found.items()}


MESSY = {
    "a.jpg": picture(1, "JPEG"),
    "a.txt": "a red fox\n",
    "b.PNG": picture(2),
    "b.TXT": "\ufeffof b",
    "b.json": '\ufeff{"caption": "not this", "score": 5.5, "tags": ["x"]}',
    "both.jpg": picture(3, "JPEG"),
    "both.webp": picture(4, "WEBP"),
    "both.json": '{"n": 1}',
    "bad.png": picture(),
    "bad.json": "{",
    "list.png": picture(),
    "list.json": "[]",
    "large.png": picture(),
    "large.txt": "x" * (items.SIDECAR + 1),
    "latin.png": picture(),
    "latin.txt": "caf\xe9".encode("latin-1"),
    "long.png": picture(),
    "long.txt": "x" * items.SIDECAR,
    "twice.png": picture(),
    "twice.TXT": "first",
    "twice.txt": "second",
    "alone.txt": "no picture",
    "alone.json": "{}",
    "anim.gif": b"GIF89a",
    "anim.txt": "of a gif",
    "notes.md": "notes",
    "Thumbs.db": b"",
    "noextension": b"",
    "metadata.csv": "file_name,text",
    ".hidden.jpg": picture(),
    ".git/x.jpg": picture(),
    "empty": None,
    "folder.jpg/c.jpg": picture(5),
    "sub/deep/d.jpeg": picture(6, "JPEG"),
    "sub/deep/metadata.jsonl": '{"file_name": "d.jpeg", "text": "inner", "b": 1}',
    "sub/e.png": picture(7),
    "metadata.jsonl": "\n".join(
        [
            '{"file_name": "a.jpg", "text": "a fox", "caption": "behind", "n": 1}',
            '{"file_name": "./sub//e.png", "text": "e \\u00e9"}',
            "",
            '{"file_name": "sub/e.png", "text": "again"}',
            '{"file_name": "sub/none.png"}',
            '{"file_name": "nowhere/none.png"}',
            '{"file_name": "folder.jpg"}',
            '{"file_name": ".hidden.jpg"}',
            '{"file_name": ".git/x.jpg"}',
            '{"file_name": "../a.jpg"}',
            '{"file_name": "/etc/passwd"}',
            '{"file_name": "C:\\\\a.jpg"}',
            '{"file_name": 3}',
            '{"file_name": "."}',
            '{"text": "whose?"}',
            '{"file_name": "b.PNG", "score": NaN}',
            "[]",
            "x" * (items.SIDECAR + 5),
            '{"file_name": "sub/deep/d.jpeg", "text": "outer", "a": "1"}',
            '{"file_name": "\\u0000/\\ud800.jpg"}',
            '{"file_name": "notes.md"}',
        ]
    ),
}
GONE = "metadata.jsonl names it, but it does not exist"
OUT = "a file_name that leads out of its folder"
REASONS = {
    "alone.json": "a caption without a picture",
    "alone.txt": "a caption without a picture",
    "anim.gif": "not JPEG, PNG or WebP by its name",
    "anim.txt": "a caption without a picture",
    "notes.md": "not JPEG, PNG or WebP by its name",
    "Thumbs.db": "not JPEG, PNG or WebP by its name",
    "noextension": "not JPEG, PNG or WebP by its name",
    "bad.png": "its .json cannot be read",
    "list.png": "its .json cannot be read",
    "latin.png": "its .txt cannot be read",
    "large.png": "its .txt is too large, more than 1048576 bytes",
    "twice.txt": "a second sidecar of its kind",
    **dict.fromkeys([f"metadata.jsonl:{n}" for n in (5, 6, 7, 8, 9, 20)], GONE),
    **dict.fromkeys([f"metadata.jsonl:{n}" for n in (10, 11, 12)], OUT),
    **dict.fromkeys(
        [f"metadata.jsonl:{n}" for n in (13, 14, 15)], "a line without a file_name"
    ),
    "metadata.jsonl:4": "a duplicate file_name",
    "metadata.jsonl:17": "a line that cannot be read",
    "metadata.jsonl:18": "a line of more than 1048576 bytes",
}
KEPT = {
    "a.jpg": {"text": "a fox", "n": 1, "caption": "a red fox\n"},
    "b.PNG": {"score": 5.5, "tags": ["x"], "caption": "of b"},
    "both.jpg": {"n": 1},
    "both.webp": {"n": 1},
    "long.png": {"caption": items.TEXT * "x"},
    "twice.png": {"caption": "first"},
    "folder.jpg/c.jpg": {},
    "sub/deep/d.jpeg": {"text": "inner", "a": "1", "b": 1},
    "sub/e.png": {"text": "e é"},
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return put(tmp_path_factory.mktemp("messy"), MESSY)


@pytest.mark.parametrize("size", [1, 2, 7, 4096])
@pytest.mark.parametrize("local", [True, False])
def test_every_file_is_accounted_for_once(messy, size, local, monkeypatch):
    if not local:  # as if it were in a bucket
        monkeypatch.setattr(files, "remote", lambda path: True)
    kept, rejected = ingested(messy, size=size)
    gone = {} if local else {"metadata.jsonl:7"}  # names a folder, which costs to see
    assert {k: v.split(": ")[0] for k, v in rejected.items()} == {
        k: v for k, v in REASONS.items() if k not in gone
    }
    assert columns(kept) == KEPT
    for source, item in kept.items():
        assert item.read() == MESSY[source] and item.bytes == len(MESSY[source])
        assert pickle.loads(pickle.dumps(item)).read() == item.read()


def test_parts_are_of_so_many_pictures_in_one_order(messy):
    whole = [
        each.source
        for part in input_parts.plan([messy], size=10**6)
        for each in input_parts.items(part)
    ]
    for size in (1, 3, 10):
        parts = input_parts.plan([messy], size=size)
        found = [list(input_parts.items(part)) for part in parts]
        assert [each.source for part in found for each in part] == whole
        assert max(sum(not is_rejected(x) for x in part) for part in found) <= size
        lines = [sum(".jsonl:" in x.source for x in part) for part in found]
        assert [p.count for p in parts] == [
            len(part) - more for part, more in zip(found, lines)
        ]
    assert input_parts.plan([messy], size=3) == input_parts.plan([messy], size=3)


NAMES = st.sampled_from(["a", "b", "A", "a.b", "metadata", "é", ".h", ""])
ENDS = st.sampled_from([".jpg", ".PNG", ".txt", ".TXT", ".json", ".jsonl", ".gif", ""])
PLACES = st.sampled_from(["", "d/", "d/e/", "d.jpg/", "z/"])


@QUICK
@given(
    st.lists(st.builds(lambda *x: "".join(x), PLACES, NAMES, ENDS)), st.integers(1, 5)
)
def test_any_folder(tmp_path_factory, names, size):
    folder = tmp_path_factory.mktemp("any")
    put(folder, {"first.jpg": b"x"})
    for name in names:
        if not (name.endswith("/") or (folder / name).exists()):
            put(folder, {name: b"{}"})
    kept, rejected = ingested(folder, size=size)
    # A sidecar is accounted for with its picture, metadata.jsonl in its lines.
    files = {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    lines = {each for each in rejected if ".jsonl:" in each}
    beside = files - set(kept) - (set(rejected) - lines)
    assert set(kept) | (set(rejected) - lines) <= files
    for each in beside:
        stem, extension = os.path.splitext(each)
        assert each.endswith("metadata.jsonl") or (
            extension.lower() in (".txt", ".json")
            and any(stem in (name, os.path.splitext(name)[0]) for name in kept)
        )


def test_links_and_odd_things_do_not_hang(tmp_path):
    put(tmp_path, {"a.jpg": picture(), "d/b.jpg": picture(1), "c.jpg": picture()})
    (tmp_path / "d/loop").symlink_to(tmp_path)
    (tmp_path / "itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "dangling.png").symlink_to("nothing")
    (tmp_path / "linked.jpg").symlink_to("d/b.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "d/loop/a.jpg"}')
    kept, rejected = ingested(tmp_path)
    assert set(kept) == {"a.jpg", "d/b.jpg", "linked.jpg"}
    assert kept["linked.jpg"].read() == picture(1)
    other = "cannot be read: not a file, or a link to none"
    assert rejected == {
        "c.jpg": "its .txt cannot be read: not a file",
        "d/loop": "a link to a folder, which is not followed",
        "itself.jpg": other,
        "dangling.png": other,
        "pipe.jpg": other,
        "metadata.jsonl:1": GONE,
    }


def test_odd_names(tmp_path):
    folder = os.fsencode(put(tmp_path, {"ä 狐.jpg": picture(), "sub": None}))
    names = [b"\xff.jpg", b"line\nbreak.jpg", b"sub/\x9b\xfe.png", b"\xc2\x85.jpg"]
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(picture())
    os.mkdir(os.path.join(folder, b"\xfe"))
    with open(os.path.join(folder, b"\xfe/a.jpg"), "wb") as file:
        file.write(picture())
    kept, rejected = ingested(tmp_path, size=2)
    assert set(kept) == {"ä 狐.jpg"}
    assert set(rejected.values()) == {"an odd name"} and len(rejected) == 5
    assert all(source.isprintable() for source in rejected)


def test_pictures_that_are_too_large(tmp_path):
    put(tmp_path, {"a.jpg": picture(), "b.jpg": b""})
    os.truncate(tmp_path / "b.jpg", images.BYTES + 1)  # takes no space
    kept, rejected = ingested(tmp_path)
    assert set(kept) == {"a.jpg"}
    assert rejected == {"b.jpg": f"more than {images.BYTES} bytes"}
    os.truncate(tmp_path / "a.jpg", images.BYTES + 1)  # since then
    with pytest.raises(BadItem, match=f"^more than {images.BYTES} bytes$"):
        kept["a.jpg"].read()


def test_a_file_that_vanishes_is_a_bad_item(tmp_path):
    put(tmp_path, {"a.jpg": picture(), "b.jpg": picture(), "b.txt": "of b"})
    found = input_parts.items(input_parts.plan([str(tmp_path)])[0])
    first = next(found)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.txt").unlink()
    with pytest.raises(BadItem, match="^cannot be read: No such file or directory$"):
        first.read()
    assert next(found).reason == "its .txt cannot be read: No such file or directory"


CHANGES = {
    "added": lambda d: put(d, {"d/new.jpg": b""}),
    "added far on": lambda d: put(d, {"d/zzz.md": b""}),
    "a folder added": lambda d: put(d, {"d/new": None}),
    "removed": lambda d: (d / "d/2.jpg").unlink(),
    "grown": lambda d: put(d, {"d/2.jpg": b"more"}),
    "renamed": lambda d: (d / "d/3.jpg").rename(d / "d/33.jpg"),
    "a sidecar grown": lambda d: put(d, {"d/2.txt": b"more"}),
    "the metadata above": lambda d: put(d, {"metadata.jsonl": b"{}\n\n"}),
    "now a folder": lambda d: [(d / "d/2.jpg").unlink(), (d / "d/2.jpg").mkdir()],
    "all removed": lambda d: (d / "d").rename(d / ".d"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_is_refused(tmp_path, change):
    files = {f"d/{i}.jpg": b"x" for i in range(9)} | {"d/2.txt": b"2"}
    put(tmp_path, files | {"metadata.jsonl": b"{}\n", ".hidden": b"", "e/a.jpg": b""})
    planned = input_parts.plan([str(tmp_path)], size=4)
    put(tmp_path, {".hidden2": b""})
    for part in planned:
        list(input_parts.items(part))
    CHANGES[change](tmp_path)
    with pytest.raises(UserError, match="since the job began|No such file") as told:
        for part in planned:
            list(input_parts.items(part))
    assert str(tmp_path) in str(told.value) and str(told.value).isprintable()


def test_a_folder_is_listed_without_opening_its_pictures(tmp_path, monkeypatch):
    for i in range(5000):
        (tmp_path / f"{i}.jpg").touch()
    (tmp_path / "7.txt").write_text("seven")
    opened, really = [], builtins.open

    def spy(path, *args, **kwargs):
        opened.append(os.path.basename(path))
        return really(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    parts = input_parts.plan([str(tmp_path)], size=2500)
    assert [part.count for part in parts] == 2 * [2500] and not opened
    found = [each for part in parts for each in input_parts.items(part)]
    assert len(found) == 5000 and set(opened) == {"7.txt"}


def test_only_the_lines_of_a_part_are_kept(tmp_path):
    """Whatever a line looks like, its picture has the same columns in any part."""
    odd = ['"x": {"file_name": "1.jpg"}, ', '"file\\u005fname2": 3, ', '"t": "é", ', ""]
    lines = [
        "{" + odd[i % 4] + f'"file_{"n" if i % 3 else chr(92) + "u006e"}ame" : '
        f'"{"./" if i % 5 else ""}{i}.jpg", "n": {i}' + "}"
        for i in range(60)
    ]
    put(tmp_path, {f"{i}.jpg": b"" for i in range(60)})
    put(tmp_path, {"metadata.jsonl": "\r\n".join(lines)})
    kept, rejected = ingested(tmp_path, size=1)
    assert {source: item.columns["n"] for source, item in kept.items()} == {
        f"{i}.jpg": i for i in range(60)
    }
    assert not rejected
    whole = columns(ingested(tmp_path)[0])
    assert whole == columns(kept)


def test_metadata_that_cannot_be_read(tmp_path, monkeypatch):
    """Its pictures are not taken for pictures without captions."""
    put(
        tmp_path,
        {"a.jpg": b"", "d/b.jpg": b"", "d/metadata.jsonl": b"", "e/c.jpg": b""},
    )
    really = builtins.open

    def fails(path, *args, **kwargs):
        if str(path).endswith("metadata.jsonl"):
            raise PermissionError(13, "Permission denied")
        return really(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", fails)
    kept, rejected = ingested(tmp_path)
    assert set(kept) == {"a.jpg", "e/c.jpg"}
    assert rejected == {
        "d/metadata.jsonl": "cannot be read: Permission denied",
        "d/b.jpg": "its metadata.jsonl cannot be read: Permission denied",
    }


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    put(tmp_path, {"a.jpg": b"", "d/b.jpg": b"", "e/c.jpg": b""})
    really = os.scandir

    def fails(path):
        if str(path).endswith("/d"):
            raise PermissionError(13, "Permission denied")
        return really(path)

    planned = input_parts.plan([str(tmp_path)])
    monkeypatch.setattr(os, "scandir", fails)
    kept, rejected = ingested(tmp_path)
    assert set(kept) == {"a.jpg", "e/c.jpg"}
    assert rejected == {"d/": "cannot be read: Permission denied"}
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        list(input_parts.items(planned[0]))


# Tars


def packed(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data or b"")
            info.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            tar.addfile(info, io.BytesIO(data or b""))
    return str(path)


FILES = {
    "c/a.jpg": picture(1, "JPEG"),
    "c/a.txt": "a red fox",
    "c/a.json": '{"caption": "not this", "score": 5.5}',
    "c/b.png": picture(2),
    "c/b.json": '{"caption": "b", "tags": ["x", "y"], "of": {"n": true}}',
    "c/e.webp": picture(3, "WEBP"),
}


def test_tar_and_parquet_hold_what_the_folder_holds(tmp_path):
    kept, rejected = ingested(put(tmp_path / "d", FILES))
    tarred, none = ingested(packed(tmp_path / "x.tar", {"c": None} | FILES))
    assert not rejected and not none and len(kept) == 3
    assert list(columns(tarred)) == ["x.tar:c/a", "x.tar:c/b", "x.tar:c/e"]
    names = {name for item in kept.values() for name in item.columns}
    rows = [
        {"image": {"bytes": item.read()}} | {n: item.columns.get(n) for n in names}
        for item in kept.values()
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "y.parquet")
    stored, none = ingested(tmp_path / "y.parquet")
    assert not none and list(stored) == [f"y.parquet:{i}" for i in range(3)]
    for one, two in zip(kept.values(), tarred.values()):
        assert one.columns == two.columns and one.bytes == two.bytes
        assert one.read() == two.read() == pickle.loads(pickle.dumps(two)).read()
    for one, two in zip(kept.values(), stored.values()):
        given = {k: v for k, v in two.columns.items() if v is not None}
        assert given == one.columns and one.read() == two.read()


def test_a_tar_accounts_for_each_member(tmp_path):
    two = {"a.jpg": picture(1), "a.png": b"second", "a.JPG": b"again", "a.cls": b"7"}
    more = {"lone.txt": "a", "lone.json": "{}", "../x.jpg": b"", "b.json": "["}
    last = {"b.jpg": picture(2), "a.txt": "late", "z.jpg": picture(3)}
    kept, rejected = ingested(packed(tmp_path / "x.tar", two | more | last))
    assert columns(kept) == {"x.tar:a": {"caption": "late"}, "x.tar:z": {}}
    assert {k: v.split(": ")[0] for k, v in rejected.items()} == {
        "x.tar:a.png": "another picture of its sample",
        "x.tar:a.JPG": "a duplicate name",
        "x.tar:a.cls": "another extension",
        "x.tar:lone.txt": "a caption without a picture",
        "x.tar:lone.json": "a caption without a picture",
        "x.tar:../x.jpg": "a name that leads out of its folder",
        "x.tar:b.jpg": "its .json cannot be read",
    }


def test_what_came_before_a_tars_damage_is_kept(tmp_path):
    whole = Path(packed(tmp_path / "whole.tar", FILES)).read_bytes()
    at = whole.index(b"c/b.png")
    for end, count in ((at + 100, 1), (at + 512 + 10, 1), (600, 0), (0, 0)):
        (tmp_path / "x.tar").write_bytes(whole[:end])
        kept, rejected = ingested(tmp_path / "x.tar")
        assert len(kept) == count and set(rejected) == {"x.tar"}
        assert rejected["x.tar"].startswith("a damaged tar: at ")
    # A picture after which its caption may have come is not one without a caption.
    (tmp_path / "x.tar").write_bytes(whole[: whole.index(b"c/a.txt") + 100])
    kept, rejected = ingested(tmp_path / "x.tar")
    assert not kept and rejected["x.tar:c/a.jpg"] == "its tar is cut off after it"


def test_a_changed_tar_is_refused_or_a_bad_item(tmp_path):
    path = packed(tmp_path / "x.tar", FILES)
    part = input_parts.plan([path])[0]
    item = next(input_parts.items(part))
    os.truncate(path, 100)
    with pytest.raises(
        BadItem, match="^cannot be read: .* bytes, of which 0 could be read$"
    ):
        item.read()
    with pytest.raises(UserError, match="x.tar: was removed or changed since"):
        list(input_parts.items(part))
    os.remove(path)
    with pytest.raises(UserError, match="x.tar: was removed or changed since"):
        list(input_parts.items(part))
    with pytest.raises(BadItem, match="^cannot be read: No such file"):
        item.read()


# Parquet files


def stored(path, count=10, group=3, column="image", **more):
    pictures = [picture(i) for i in range(count)]
    texts = [f"row {i}" for i in range(count)]
    table = pa.table({column: pictures, "text": texts, **more})
    pq.write_table(table, path, row_group_size=group)
    return str(path)


def test_parts_are_row_groups_put_together(tmp_path):
    path = stored(tmp_path / "x.parquet")
    for size, counts in ((1, [3, 3, 3, 1]), (6, [6, 4]), (7, [6, 4]), (100, [10])):
        parts = input_parts.plan([path], size=size)
        assert [part.count for part in parts] == counts
        found = [each for part in parts for each in input_parts.items(through(part))]
        assert [each.source for each in found] == [f"x.parquet:{i}" for i in range(10)]
        assert [each.columns for each in found] == [
            {"text": f"row {i}"} for i in range(10)
        ]
        assert [each.read() for each in found] == [picture(i) for i in range(10)]
        assert 0.9 < sum(p.bytes for p in parts) / os.path.getsize(path) <= 1


@pytest.mark.parametrize(
    "column", ["jpg", "webp", "image_bytes", "bytes", "img", "Image", "PNG"]
)
def test_the_column_of_pictures_is_found(tmp_path, column):
    others = {"mask": 10 * [picture()], "large": 10 * [b"x" * 2**21]}
    path = stored(tmp_path / "x.parquet", column=column, **others)
    kept, rejected = ingested(path)
    assert kept["x.parquet:3"].columns.pop("mask") is None
    assert len(kept) == 10 and not rejected
    assert kept["x.parquet:3"].columns == {"text": "row 3"}


def test_values_are_plain(tmp_path):
    time = datetime.datetime(2020, 1, 2, 3, 4, 5)
    values = {
        "n": pa.array([5], pa.int8()),
        "half": pa.array([0.5], pa.float16()),
        "sure": [True],
        "time": pa.array([time], pa.timestamp("ns")),
        "late": pa.array([2**50], pa.timestamp("ms")),
        "day": [time.date()],
        "took": [datetime.timedelta(seconds=3)],
        "price": pa.array([1.25], pa.float64()).cast(pa.decimal128(5, 2)),
        "kind": pa.array(["a"]).dictionary_encode(),
        "tags": [["x", "y"]],
        "of": [{"a": 1, "raw": b"dropped"}],
        "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "none": [None],
        "long": ["x" * (items.TEXT + 1)],
        "broken": pa.array([b"\xff"]).view(pa.string()),
    }
    kept, _ = ingested(stored(tmp_path / "x.parquet", count=1, **values))
    found = kept["x.parquet:0"].columns
    assert json.loads(json.dumps(found)) == found
    assert found.pop("time").startswith("2020-01-02 03:04:05")
    assert found.pop("took") == "0:00:03" and len(found.pop("long")) == items.TEXT
    assert "1125899906842624" in found.pop("late")  # a year that no calendar has
    assert found == {
        "text": "row 0",
        "n": 5,
        "half": 0.5,
        "sure": True,
        "day": "2020-01-02",
        "price": 1.25,
        "kind": "a",
        "tags": ["x", "y"],
        "of": {"a": 1},
        "map": [["k", 1]],
        "none": None,
        "broken": None,
    }


KINDS = {
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary of strings": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of bytes": pa.dictionary(pa.int8(), pa.binary()),
    "list of bytes": pa.list_(pa.binary()),
}


@pytest.mark.parametrize("name", ["text", "Caption", "mine"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_type_are_read(tmp_path, kind, name):
    texts = [["a fóx"], None] if "list" in kind else ["a fóx", None]
    column = pa.array(texts).cast(KINDS[kind]) if "list" in kind else None
    if column is None and "dictionary" in kind:
        values = pa.array(["a fóx"]).cast(KINDS[kind].value_type)
        places = pa.array([0, None], KINDS[kind].index_type)
        column = pa.DictionaryArray.from_arrays(places, values)
    elif column is None:
        texts = [x and x.encode() for x in texts] if "binary" in kind else texts
        column = pa.array(texts, KINDS[kind])
    table = pa.table({"image": 2 * [picture()], name: column})
    pq.write_table(table, tmp_path / "x.parquet")
    kept, rejected = ingested(tmp_path / "x.parquet")
    assert not rejected
    found = [kept[f"x.parquet:{i}"].columns[name] for i in range(2)]
    assert found == [["a fóx"] if "list" in kind else "a fóx", None]


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_a_caption_that_is_not_utf8_is_refused_by_name(tmp_path, kind):
    column = pa.array([b"caf\xe9", b"fine"])
    column = column.view(pa.string()) if kind == "string" else column
    path = stored(tmp_path / "x.parquet", count=2, Caption=column)
    kept, rejected = ingested(path)
    assert kept["x.parquet:1"].columns["Caption"] == "fine"
    assert rejected == {"x.parquet:0": "its Caption cannot be read: not UTF-8"}


def test_a_null_caption_hides_none_of_json(tmp_path):
    rows = [{"caption": "a fox"}, {"caption": "a fox"}]
    more = {"json": rows, "caption": [None, "a hen"]}
    kept, _ = ingested(stored(tmp_path / "x.parquet", count=2, **more))
    assert [x.columns["caption"] for x in kept.values()] == ["a fox", "a hen"]


def test_a_column_twice_is_refused(tmp_path):
    columns = [pa.array([picture()]), pa.array(["a fox"]), pa.array(["a hen"])]
    table = pa.Table.from_arrays(columns, ["image", "text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    kept, rejected = ingested(tmp_path / "x.parquet")
    why = "the column text appears twice: rename or remove one"
    assert not kept and rejected == {"x.parquet": why}


def test_rows_without_a_picture(tmp_path):
    rows = [None, {"bytes": None, "path": "x.jpg"}, {"bytes": b"", "path": None}]
    rows.append({"bytes": picture(), "path": "y.jpg"})
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    kept, rejected = ingested(tmp_path / "x.parquet")
    assert set(kept) == {"x.parquet:3"} and kept["x.parquet:3"].columns == {}
    assert rejected == {f"x.parquet:{i}": "no picture in its row" for i in range(3)}


def test_a_damaged_parquet_file_is_one_rejected(tmp_path):
    path = tmp_path / "x.parquet"
    whole = Path(stored(path, count=8, group=8)).read_bytes()
    for data in (b"", b"PAR1", whole[:-50], b"x" * 5000):
        path.write_bytes(data)
        assert ingested(path)[0] == {}
        assert ingested(path)[1]["x.parquet"].startswith("cannot be read: ")
    stored(path, column="photo")
    assert ingested(path)[1]["x.parquet"] == (
        "no column of pictures; expected one of bytes, or of a struct with bytes,"
        " named image or img or jpg: rename it; its columns are photo (binary),"
        " text (string)"
    )
    assert input_parts.plan([str(path)])[0].count is None


def test_of_a_damaged_row_group_the_others_are_kept(tmp_path):
    path = stored(tmp_path / "x.parquet", count=9, group=3)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(60 * b"\xff")
    kept, rejected = ingested(path)
    assert [each.split(":")[1] for each in kept] == ["0", "1", "2", "6", "7", "8"]
    assert set(rejected) == {"x.parquet:3-5"}
    assert rejected["x.parquet:3-5"].startswith("cannot be read: ")


def test_a_row_group_is_not_in_memory_at_once(tmp_path):
    """80 MB of pictures in one row group; what is held is one batch of them."""
    data = [os.urandom(100_000) for _ in range(8)] * 100
    rows = pa.table({"image": data, "n": list(range(800))})
    pq.write_table(
        rows, tmp_path / "x.parquet", compression="none", use_dictionary=False
    )
    del rows
    part, most, start = (
        input_parts.plan([str(tmp_path / "*.parquet")])[0],
        0,
        pa_bytes(),
    )
    for i, each in enumerate(input_parts.items(part)):
        most = max(most, pa_bytes() - start)
        assert each.columns == {"n": i} and each.read() == data[i]
    assert i == 799 and most < 30e6


def pa_bytes():
    return pa.total_allocated_bytes()


# Inputs


def test_sources_are_told_apart_by_as_little_as_does(tmp_path):
    put(tmp_path, {"p/cats/a.jpg": b"", "q/cats/a.jpg": b"", "dogs/a.jpg": b""})
    packed(tmp_path / "p/x.tar", FILES)
    packed(tmp_path / "q/x.tar", FILES)
    packed(tmp_path / "q/z.tar", FILES)
    inputs = [tmp_path / "q/cats", tmp_path / "p/cats", tmp_path / "dogs"]
    inputs += [tmp_path / "*/?.tar"]
    kept, _ = ingested(*inputs)
    assert {source.split(":")[0] for source in kept} == {
        "dogs/a.jpg",
        "p/cats/a.jpg",
        "q/cats/a.jpg",
        "p/x.tar",
        "q/x.tar",
        "z.tar",
    }
    backwards = [str(each) for each in reversed(inputs)]
    assert input_parts.plan(backwards) == input_parts.plan(
        [str(each) for each in inputs]
    )


def refused(*inputs, **options):
    with pytest.raises(UserError) as told:
        input_parts.plan([str(each) for each in inputs], **options)
    assert str(told.value).isprintable()
    return str(told.value)


def test_inputs_that_are_refused(tmp_path):
    put(tmp_path, {"d/a.jpg": b"", "d/e/b.jpg": b"", "x.tgz": b"", "none": None})
    tar = packed(tmp_path / "x.tar", FILES)
    (tmp_path / "y.tar").symlink_to(tar)
    os.link(tar, tmp_path / "z.tar")
    (tmp_path / "f").symlink_to(tmp_path / "d")
    at = lambda name: str(tmp_path / name)
    assert refused(at("nothing")) == f"{at('nothing')}: no such file or folder"
    assert refused(at("*.zip")) == f"{at('*.zip')}: matches no file"
    assert refused(at("x.tgz")).startswith(
        f"{at('x.tgz')}: unknown kind of input; expected"
    )
    assert refused(tar, at("y.tar")).endswith(f"listed twice, also as {tar}")
    assert refused(tar, at("z.tar")).endswith(f"listed twice, also as {tar}")
    assert refused(tar, tar) == f"{tar}: the same input is listed twice"
    assert refused(at("d"), at("f")).endswith(f"listed twice, also as {at('d')}")
    assert refused(at("f"), at("d/e")) == (
        f"{at('d/e')}: is inside {at('f')}, which is listed too; remove one of them"
    )
    assert refused(at("none")).startswith(
        f"{at('none')}: contains no pictures; their names must end in jpg"
    )
    assert refused() == "no input; set folders, tars or parquet files, or globs of them"
    assert refused(tar, size=0) == "parts of 0 pictures; expected 1 or more"


def test_a_tar_that_cannot_be_opened_is_planned(tmp_path, monkeypatch):
    tar = packed(tmp_path / "x.tar", FILES)

    def fails(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", fails)
    kept, rejected = ingested(tar)
    assert not kept
    assert rejected == {"x.tar": "a damaged tar: cannot be read: Permission denied"}


def test_an_item_is_what_it_says(tmp_path):
    kept, _ = ingested(put(tmp_path, {"a.jpg": picture(1, "JPEG")}))
    item = kept["a.jpg"]
    assert isinstance(item, Item) and images.read(item.read()).shape == (16, 16, 3)
