"""precompute started again sees that its input is not what its records were made of."""

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
    monkeypatch.setattr("sd3_jax.data.folders.read_columns", None)  # not read again
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
