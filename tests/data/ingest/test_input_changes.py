"""precompute started again sees what has changed: its input, or what it wrote."""

import io
import json
import os
import shutil
import tarfile

import pytest
from PIL import Image

from sd3_jax import main

TINY = "--config=configs/sd3_2b.py:tiny"


def picture(shade):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 90, 10)).save(data, "PNG")
    return data.getvalue()


def start(folder, inputs, capsys):
    """Exit code and the last line of what the job says."""
    argv = ["precompute", TINY, f"--workdir={folder}/out", "--config.precompute.part=2"]
    argv += ["--config.precompute.only=", f"--config.ingest.inputs={inputs}"]
    code = main.main(argv)
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err.strip().split("\n")[-1]


def rewrite(path, data):
    """Other bytes of the same number, some time later."""
    assert len(path.read_bytes()) == len(data)
    path.write_bytes(data)
    touch(path)


def touch(path):
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 10**9))


def blank(path):
    """One byte more, of a file that may be new."""
    with open(path, "ab") as file:
        file.write(b" ")


CHANGES = {
    "added": (
        lambda d: (d / "b/new.png").write_bytes(picture(1)),
        "1 added (b/new.png)",
    ),
    "a caption added": (
        lambda d: (d / "b/3.txt").write_text("x"),
        "1 edited (b/3.png: ",
    ),
    "removed": (lambda d: (d / "a/0.png").unlink(), "1 removed (a/0.png)"),
    "a caption edited": (
        lambda d: rewrite(d / "a/1.txt", b"number 7"),
        "1 edited (a/1.png: its caption",
    ),
    "metadata edited": (
        lambda d: rewrite(d / "b/metadata.jsonl", LINE.replace("of", "no").encode()),
        "1 edited (b/3.png: its caption",
    ),
    "a picture edited": (
        lambda d: rewrite(d / "a/1.png", picture(2)),
        "1 edited (a/1.png: the picture)",
    ),
    "a larger picture": (
        lambda d: blank(d / "a/1.png"),
        "1 edited (a/1.png: the pictu",
    ),
    "a rejected one": (
        lambda d: rewrite(d / "b/bad.png", b"nane"),
        "1 edited (b/bad.png: the picture)",
    ),
}
LINE = '{"file_name": "3.png", "text": "of metadata"}\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in three parts, and what was made of it."""
    folder = tmp_path_factory.mktemp("stale")
    for name in "a", "b":
        (folder / "in" / name).mkdir(parents=True)
    for i in range(3):
        (folder / f"in/a/{i}.png").write_bytes(picture(i))
        (folder / f"in/a/{i}.txt").write_text(f"number {i}")
    (folder / "in/b/3.png").write_bytes(picture(3))
    (folder / "in/b/metadata.jsonl").write_text(LINE)
    (folder / "in/b/bad.png").write_bytes(b"none")
    (folder / "in/b/bad.txt").write_text("of none")
    return folder


@pytest.fixture
def done(made, tmp_path, capsys):
    shutil.copytree(made / "in", tmp_path / "in")
    code, said = start(tmp_path, tmp_path / "in", capsys)
    assert code == 0 and "6 files" not in said
    return tmp_path, said


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_told_by_name(done, capsys, change):
    folder, _ = done
    make, words = CHANGES[change]
    make(folder / "in")
    code, said = start(folder, folder / "in", capsys)
    assert code == 2 and words in said, said
    assert "config.ingest.inputs: " in said and "another workdir" in said
    assert start(folder, folder / "in", capsys) == (2, said)


def test_other_times_alone_are_no_change(done, capsys, monkeypatch):
    folder, first = done
    assert start(folder, folder / "in", capsys) == (0, first)
    for path in (folder / "in").rglob("*.*"):
        touch(path)
    assert start(folder, folder / "in", capsys) == (0, first)
    monkeypatch.setattr(
        "sd3_jax.data.ingest.folders.read_columns", None
    )  # not read again
    assert start(folder, folder / "in", capsys) == (0, first)  # the plan has the new


def pack(path, caption):
    with tarfile.open(path, "w") as tar:
        for name, data in ("1.png", picture(1)), ("1.txt", caption):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_tar_that_was_packed_again(tmp_path, capsys):
    path = tmp_path / "x.tar"
    pack(path, b"a fox")
    code, first = start(tmp_path, path, capsys)
    pack(path, b"a fox")
    touch(path)
    assert start(tmp_path, path, capsys) == (code, first) and code == 0
    pack(path, b"a hen")
    code, said = start(tmp_path, path, capsys)
    assert code == 2 and "1 edited (x.tar:1: its caption" in said


def test_a_plan_of_an_earlier_version_is_taken_as_it_is(done, capsys):
    folder, first = done
    plan = json.loads((folder / "out/plan.json").read_text())
    for part in plan["parts"]:
        del part["stamp"]
    (folder / "out/plan.json").write_text(json.dumps(plan))
    assert start(folder, folder / "in", capsys) == (0, first)


def killed_after(folder, part):
    """As if the job had been killed: what it did of later parts is gone."""
    for path in (folder / "out/parts").iterdir():
        if int(path.name[:5]) > part:
            path.unlink()
    (folder / "out/manifest.json").unlink()


@pytest.fixture
def killed(tmp_path, capsys):
    """Five parts of pictures 10 to 18 in one folder, of which 0, 1 are done."""
    (tmp_path / "in").mkdir()
    for i in range(10, 19):
        (tmp_path / f"in/{i}.png").write_bytes(picture(i))
        (tmp_path / f"in/{i}.txt").write_text("x")
    assert start(tmp_path, tmp_path / "in", capsys)[0] == 0
    killed_after(tmp_path, 1)
    return tmp_path


AFTER_A_KILL = {
    "added to what is done": (["add 105"], "inputs: 1 added (105.png) since"),
    "removed of it": (["remove 11"], "inputs: 1 removed (11.png) since"),
    "both": (["add 105", "remove 17"], "inputs: 1 added (105.png) since"),
    "added before all": (["add 09"], "inputs: 1 added (09.png) since"),
    "added to the rest": (["add 165"], "6 where 5 were planned"),
    "removed of the rest": (["remove 17"], "4 where 5 were planned"),
}


@pytest.mark.parametrize("case", AFTER_A_KILL)
def test_after_a_kill_the_files_that_changed_are_named(killed, capsys, case):
    changes, words = AFTER_A_KILL[case]
    for change in changes:
        verb, name = change.split()
        path = killed / f"in/{name}.png"
        if verb == "add":
            path.write_bytes(picture(1))
            path.with_suffix(".txt").write_text("x")
        else:
            path.unlink()
            path.with_suffix(".txt").unlink()
    code, said = start(killed, killed / "in", capsys)
    assert code == 2 and words in said, said


def test_after_a_kill_what_is_not_done_may_change(killed, capsys):
    rewrite(killed / "in/17.png", picture(99))
    (killed / "in/18.txt").write_text("another caption")
    code, said = start(killed, killed / "in", capsys)
    assert code == 0 and "9 files: 9 records" in said


def test_another_spelling_of_the_input_is_the_same(killed, capsys):
    (killed / "link").symlink_to(killed / "in")
    for spelling in f"{killed}/in/", f"{killed}/./in", f"{killed}/link":
        code, said = start(killed, spelling, capsys)
        assert code == 0 and "9 files: 9 records" in said
    assert start(killed, os.path.relpath(killed / "in"), capsys)[0] == 0


def test_another_spelling_of_a_tar_is_the_same(tmp_path, capsys):
    pack(tmp_path / "x.tar", b"a fox")
    (tmp_path / "y.tar").symlink_to(tmp_path / "x.tar")
    assert start(tmp_path, tmp_path / "x.tar", capsys)[0] == 0
    touch(tmp_path / "x.tar")
    code, said = start(tmp_path, tmp_path / "y.tar", capsys)
    assert code == 0, said


def shard_of(folder, part):
    (path,) = folder.glob(f"out/records/train-{part:05d}-*.arecord")
    return path


def without_sizes(folder):
    """Parts as an earlier version wrote them."""
    for path in folder.glob("out/parts/?????.json"):
        report = json.loads(path.read_text())
        del report["sizes"]
        for shard in report["shards"]:
            del shard["bytes"]
        path.write_text(json.dumps(report))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


LOSSES = {
    "a shard gone": lambda d: shard_of(d, 1).unlink(),
    "a shard cut": lambda d: truncate(shard_of(d, 1)),
    "of an earlier version": lambda d: (without_sizes(d), shard_of(d, 1).unlink()),
    "a report emptied": lambda d: (d / "out/parts/00001.json").write_text(""),
    "a report of nothing": lambda d: (d / "out/parts/00001.json").write_text("{}"),
    "rejected emptied": lambda d: (d / "out/parts/00002.rejected.jsonl").write_text(""),
    "rejected gone": lambda d: (d / "out/parts/00002.rejected.jsonl").unlink(),
    "sources gone": lambda d: (d / "out/parts/00001.sources.jsonl").unlink(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_part_whose_files_are_lost_is_made_again(done, capsys, caplog, loss):
    folder, first = done
    sizes = lambda: {  # bytes may differ: the entries of a header have no order
        path.name: path.stat().st_size
        for path in (*folder.glob("out/records/*"), folder / "out/rejected.jsonl")
    }
    before = sizes()
    LOSSES[loss](folder)
    assert start(folder, folder / "in", capsys) == (0, first)
    assert sizes() == before
    (line,) = [x for x in caplog.messages if x.endswith("is made again")]
    assert str(folder / "out") in line


def test_all_records_are_made_again(done, capsys, caplog):
    folder, first = done
    shutil.rmtree(folder / "out/records")
    assert start(folder, folder / "in", capsys) == (0, first)
    assert all(shard_of(folder, part).exists() for part in (0, 1))
    named = [x for x in caplog.messages if "arecord is missing: part " in x]
    assert len(named) == len([*folder.glob("out/records/*")])


def test_sound_parts_of_an_earlier_version_are_done(done, capsys, caplog):
    folder, first = done
    without_sizes(folder)
    before = shard_of(folder, 1).stat().st_mtime_ns
    assert start(folder, folder / "in", capsys) == (0, first)
    assert shard_of(folder, 1).stat().st_mtime_ns == before
    assert "again" not in caplog.text


@pytest.mark.parametrize("text", ["", "{}", '{"made_by": {}, "parts": [{}]}'])
def test_a_damaged_plan_is_one_line(done, capsys, text):
    folder, first = done
    (folder / "out/plan.json").write_text(text)
    code, said = start(folder, folder / "in", capsys)
    assert code == 2 and f"{folder}/out/plan.json: not " in said
    assert f"delete it and {folder}/out/parts, and start again" in said
    (folder / "out/plan.json").unlink()
    shutil.rmtree(folder / "out/parts")
    assert start(folder, folder / "in", capsys) == (0, first)
