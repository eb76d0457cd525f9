"""Captions as other tools lay them out: each picture comes with its own, or is told."""

import io
import json
import tarfile

import pytest
from PIL import Image

from sd3_jax.data.ingest import captions, input_parts
from sd3_jax.data.ingest.input_parts import Rejected

SPECS = captions.parse(["caption"])


def picture(shade):
    data = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(data, "PNG")
    return data.getvalue()


A, B = picture(1), picture(2)


def put(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def pack(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def captioned(path):
    """Captions by source, and the reasons of what was rejected."""
    (part,) = input_parts.plan([str(path)])
    items = list(input_parts.items(part))
    kept = {
        x.source: captions.draw(x.columns, SPECS, seed=0, source=x.source).text
        for x in items
        if not isinstance(x, Rejected)
    }
    return kept, {x.source: x.reason for x in items if isinstance(x, Rejected)}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


BOTH = {"train/a.png": "a fox", "train/b.PNG": "a hen"}
PICTURES = {"train/a.png": A, "train/b.PNG": B}
FOLDERS = {
    "txt": {"train/a.txt": "a fox\n", "train/b.TXT": "\ufeffa hen\r\n"},
    "caption": {"train/a.caption": "a fox", "train/b.caption": "a hen\n"},
    "after the whole name": {"train/a.png.txt": "a fox", "train/b.PNG.txt": "a hen"},
    "in other letters": {"train/a.png.caption": "a fox", "train/b.png.TXT": "a hen"},
    "json": {
        "train/a.json": '{"caption": "a fox", "score": NaN}',
        "train/b.png.json": '{"Prompt": "a hen", "s": [Infinity, 1e999]}',
    },
    "of the folder": {
        "train/metadata.jsonl": lines(
            {"file_name": "a.png", "text": "a fox"},
            {"file_name": "b.PNG", "TEXT": "a hen"},
        )
    },
    "of the root": {
        "train/metadata.jsonl": lines(
            {"file_name": "train/a.png", "text": "a fox"},
            {"file_name": "./train/b.PNG", "text": "a hen"},
        )
    },
    "above": {
        "metadata.jsonl": lines(
            {"file_name": "train/a.png", "text": "a fox"},
            {"file_name": "set/train/b.PNG", "text": "a hen"},
        )
    },
    "not a number": {
        "metadata.jsonl": '\ufeff{"file_name": "train/a.png", "text": "a fox", '
        '"n": NaN}'
        '\r\n{"file_name": "train/b.PNG", "n": -Infinity, "caption": "a hen"}'
    },
    "csv": {
        "metadata.csv": '\ufefffile_name,text,score\r\ntrain/a.png,"a fox",0.5\r\n'
        'train/b.PNG,"a hen",\r\n'
    },
    "csv of the root": {
        "train/metadata.csv": "file_name,n,caption\ntrain/a.png,1,a fox\n"
        'b.PNG,,"a hen"\n'
    },
}


@pytest.mark.parametrize("layout", FOLDERS)
def test_a_folders_captions(tmp_path, layout):
    folder = put(tmp_path / "set", PICTURES | FOLDERS[layout])
    assert captioned(folder) == (BOTH, {})


def test_whole_paths_in_metadata(tmp_path):
    folder = tmp_path / "set"
    rows = [{"file_name": f"{folder}/train/{x}", "text": x} for x in ("a.png", "b.PNG")]
    put(folder, PICTURES | {"train/metadata.jsonl": lines(*rows)})
    assert captioned(folder)[0] == {"train/a.png": "a.png", "train/b.PNG": "b.PNG"}
    assert captioned(folder / "train")[0] == {"a.png": "a.png", "b.PNG": "b.PNG"}


def test_a_file_of_the_very_name_goes_before_one_of_the_root(tmp_path):
    row = {"file_name": "train/a.png", "text": "the inner"}
    files = PICTURES | {"train/train/a.png": A, "train/metadata.jsonl": lines(row)}
    kept, rejected = captioned(put(tmp_path, files))
    assert kept["train/train/a.png"] == "the inner" and kept["train/a.png"] == ""
    assert not rejected


def test_a_picture_whose_line_is_damaged_is_not_one_without_a_caption(tmp_path):
    text = lines({"file_name": "train/a.png", "text": "a fox"})
    text += '{"file_name": "train/b.PNG", "text": "cut o\n'
    kept, rejected = captioned(put(tmp_path, PICTURES | {"metadata.jsonl": text}))
    assert kept == {"train/a.png": "a fox"}
    assert rejected["train/b.PNG"].startswith("its line in metadata.jsonl: a line that")
    assert rejected["metadata.jsonl:2"].startswith("a line that cannot be read")
    text = "file_name,text\ntrain/a.png,a fox\ntrain/b.PNG,a hen,too many\n"
    put(tmp_path, {"metadata.csv": text})
    (tmp_path / "metadata.jsonl").unlink()
    kept, rejected = captioned(tmp_path)
    assert kept == {"train/a.png": "a fox"} and "train/b.PNG" in rejected
    put(tmp_path, {"metadata.csv": b"file_name,text\ntrain/a.png,caf\xe9\n"})
    kept, rejected = captioned(tmp_path)
    assert not kept and rejected["metadata.csv"].startswith("cannot be read")
    put(tmp_path, {"metadata.csv": "image,text\ntrain/a.png,a fox\n"})
    assert captioned(tmp_path)[1] == {
        "metadata.csv:1": "a header without file_name: its columns are image, text;"
        " rename the one with the pictures' names to file_name"
    }


FOX, HEN = "a fox", "a hen"
TARS = {
    "pairs": [("1.png", A), ("1.txt", FOX), ("2.png", B), ("2.txt", HEN)],
    "pictures first": [("1.png", A), ("2.png", B), ("1.txt", FOX), ("2.txt", HEN)],
    "captions first": [("1.txt", FOX), ("2.txt", HEN), ("1.png", A), ("2.png", B)],
    "caption": [("1.png", A), ("1.caption", FOX), ("2.PNG", B), ("2.Caption", HEN)],
    "whole names": [("1.png", A), ("1.png.txt", FOX), ("2.PNG", B), ("2.png.txt", HEN)],
    "folders first": [
        *(("images/1.png", A), ("images/1.txt", FOX)),
        *(("./images/2.png", B), ("./images/2.txt", HEN)),
    ],
    "dotted": [("1.00.png", A), ("1.00.txt", FOX), ("1.5.png", B), ("1.5.txt", HEN)],
    "dotted, whole names": [
        *(("v1.0.png", A), ("v2.0.png", B)),
        *(("v1.0.png.txt", FOX), ("v2.0.png.caption", HEN)),
    ],
}


@pytest.mark.parametrize("layout", TARS)
def test_a_tars_captions(tmp_path, layout):
    kept, rejected = captioned(pack(tmp_path / "x.tar", TARS[layout]))
    assert list(kept.values()) == [FOX, HEN] and not rejected


def test_captions_of_two_samples_of_one_name_are_not_mixed(tmp_path):
    rows = [("1.png", A), ("2.png", B), ("2.txt", HEN), ("1.png", B), ("1.txt", "?")]
    kept, rejected = captioned(pack(tmp_path / "x.tar", rows))
    assert kept == {"x.tar:1": "", "x.tar:2": HEN}
    assert set(rejected.values()) == {"a duplicate name"}


def test_a_second_file_of_a_sample_is_no_picture_of_its_own(tmp_path):
    rows = [("1.png", A), ("1.seg.png", B), ("1.txt", FOX), ("1.meta.json", "{}")]
    kept, rejected = captioned(pack(tmp_path / "x.tar", rows))
    assert kept == {"x.tar:1": FOX}
    assert set(rejected.values()) == {"another extension"} and len(rejected) == 2


FULL = '{"caption": "a fox"}'
HIDDEN = {
    "an empty a.txt": {"a.json": FULL, "a.txt": " \n"},
    "null in a.json": {"metadata.jsonl": lines({"file_name": "a.png", "text": FOX})}
    | {"a.json": '{"text": null}'},
    "an inner null": {"metadata.jsonl": lines({"file_name": "d/a.png", "text": FOX})}
    | {"d/a.png": A, "d/metadata.jsonl": '{"file_name": "a.png", "text": [""]}'},
    "metadata.csv": {"metadata.csv": "file_name,text\na.png,a fox\n"}
    | {"metadata.jsonl": lines({"file_name": "a.png", "text": ""})},
}


@pytest.mark.parametrize("case", HIDDEN)
def test_what_is_empty_hides_no_caption(tmp_path, case):
    kept, rejected = captioned(put(tmp_path, {"a.png": A} | HIDDEN[case]))
    assert FOX in kept.values() and not rejected


def test_what_is_empty_hides_no_caption_in_a_tar(tmp_path):
    rows = [("1.png", A), ("1.json", '{"caption": "a fox"}'), ("1.txt", "")]
    assert captioned(pack(tmp_path / "x.tar", rows)) == ({"x.tar:1": FOX}, {})


def test_masks_of_onetrainer_are_no_pictures(tmp_path):
    files = {"a.png": A, "a.txt": FOX, "a-masklabel.png": B, "a-condlabel.png": B}
    why = "a mask or condition of another picture (OneTrainer's -masklabel, -condlabel)"
    kept, rejected = captioned(put(tmp_path / "in", files))
    assert kept == {"a.png": FOX}
    assert rejected == {"a-masklabel.png": why, "a-condlabel.png": why}
    kept, rejected = captioned(pack(tmp_path / "x.tar", files.items()))
    assert kept == {"x.tar:a": FOX} and set(rejected.values()) == {why}


def test_utf16_of_windows(tmp_path):
    row = lines({"file_name": "b.png", "text": "a hén"}).encode("utf-16")
    files = {"a.png": A, "a.txt": "a föx".encode("utf-16"), "b.png": B}
    kept, rejected = captioned(put(tmp_path, files | {"metadata.jsonl": row}))
    assert kept == {"a.png": "a föx", "b.png": "a hén"} and not rejected


def test_backslashes_separate_folders(tmp_path):
    row = lines({"file_name": "train\\a.png", "text": FOX})
    row += lines({"file_name": ".\\train\\none.png"})
    kept, rejected = captioned(put(tmp_path, PICTURES | {"metadata.jsonl": row}))
    assert kept["train/a.png"] == FOX
    assert rejected == {
        "metadata.jsonl:2": "metadata.jsonl names it, but it does not exist"
    }
    (tmp_path / "metadata.jsonl").unlink()
    put(tmp_path, {"metadata.csv": "file_name,text\ntrain\\a.png,a fox\n"})
    assert captioned(tmp_path)[0]["train/a.png"] == FOX


def test_each_line_of_a_text_is_a_caption_and_counted_as_such(tmp_path):
    texts = {f"{i}.txt": "a fox\n\na hen\r\n" for i in range(30)}
    put(tmp_path, {f"{i}.png": A for i in range(30)} | texts)
    (part,) = input_parts.plan([str(tmp_path)])
    drawn = [
        captions.draw(x.columns, SPECS, seed=0, source=x.source)
        for x in input_parts.items(part)
    ]
    assert {each.text for each in drawn} == {FOX, HEN}
    assert {each.name for each in drawn} == {"caption (one of several)"}
