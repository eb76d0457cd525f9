"""A caption that would be lost ends precompute, or its picture is rejected by name."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sd3_jax import main
from sd3_jax.data import records, shards

TINY = "--config=configs/sd3_2b.py:tiny"


def picture(shade):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 90, 10)).save(data, "PNG")
    return data.getvalue()


A, B = picture(10), picture(200)
KEEP = "uncaptioned=keep"


@pytest.fixture
def precompute(tmp_path, capsys):
    """Runs the job on files: exit code, captions by source, counts, what it says."""

    def run(files, *flags, inputs="in"):
        for name, data in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        argv = ["precompute", TINY, f"--workdir={tmp_path}/out"]
        argv += [f"--config.ingest.inputs={tmp_path}/{inputs}"]
        argv += ["--config.precompute.only=", *(f"--config.ingest.{x}" for x in flags)]
        code = main.main(argv)
        found = {}
        for path in tmp_path.glob("out/records/*.arecord"):
            reader = shards.open_shard(str(path))
            for data in reader.read([*range(reader.num_records())]):
                record = records.decode(data, "")
                found[record.source] = record.caption
        manifest = tmp_path / "out" / "manifest.json"
        counts = json.loads(manifest.read_text()) if manifest.exists() else {}
        said = capsys.readouterr()
        return code, found, counts, said.out + said.err.strip().split("\n")[-1]

    return run


PAIR = {"a.png": A, "b.png": B, "a.txt": "a fox\n"}


def test_a_picture_without_a_caption_is_rejected_by_name(precompute, tmp_path):
    code, found, counts, said = precompute(PAIR)
    assert code == 0 and found == {"a.png": "a fox"}
    assert counts["rejected"] == {"no caption": 1} and counts["uncaptioned"] == 0
    assert "rejected 1: no caption" in said and "uncaptioned=keep" in said
    line = json.loads((tmp_path / "out/rejected.jsonl").read_text())
    assert line["source"] == "b.png"


def test_it_may_be_meant(precompute):
    code, found, counts, _ = precompute(PAIR, KEEP)
    assert code == 0 and found == {"a.png": "a fox", "b.png": ""}
    assert counts["uncaptioned"] == 1


def test_one_text_for_all(precompute):
    code, found, counts, said = precompute(PAIR, "prefix=sks style, ")
    assert code == 0 and found == {"a.png": "sks style, a fox", "b.png": "sks style"}
    assert counts["captions"] == {"caption": 1, "prefix": 1}


LOST = {
    "a mistyped column": (["captions=captoin"], "captoin is in none of the 2 pictures"),
    "one of two": (["captions=caption,sintetic"], "sintetic is in none of the 2"),
    "a prompt as a column": (["captions=a photo of sks dog"], "a photo of sks dog is"),
    "with a prefix": (["captions=captoin", "prefix=x"], "captoin is in none of the 2"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_column_that_no_picture_has(precompute, tmp_path, case):
    flags, words = LOST[case]
    code, found, _, said = precompute(PAIR, *flags)
    assert code == 2 and not found and not (tmp_path / "out/plan.json").exists()
    assert f"config.ingest.captions: {words}" in said
    assert "whose columns are caption (1)" in said and "uncaptioned=keep" in said


def test_it_may_be_meant_too(precompute):
    code, found, *_ = precompute(PAIR, "captions=caption,later", KEEP)
    assert code == 0 and found == {"a.png": "a fox", "b.png": ""}


NONE = {
    "no captions": ({}, "no caption in any of the 2 pictures"),
    "of other names": (
        {"x.txt": "a fox", "y.txt": "a hen"},
        "rejected: 2 a caption without a picture",
    ),
    "metadata of other names": (
        {"metadata.jsonl": '{"file_name": "test/a.png", "text": "a fox"}'},
        "rejected: 1 metadata.jsonl names it",
    ),
    "null": (
        {"metadata.jsonl": '{"file_name": "a.png", "text": NaN}'},
        "whose columns are text (0)",
    ),
}


@pytest.mark.parametrize("case", NONE)
def test_no_caption_at_all(precompute, case):
    files, words = NONE[case]
    code, found, _, said = precompute({"a.png": A, "b.png": B} | files)
    assert code == 2 and not found and words in said


def test_captions_that_are_left_over_are_not_covered_by_a_prefix(precompute):
    files = {"a.png": A, "b.png": B, "x.txt": "a fox"}
    assert precompute(files, "prefix=sks")[0] == 2


def test_no_record_is_a_failure(precompute):
    files = {"a.png": b"none", "a.txt": "a fox", "b.gif": b"GIF89a"}
    code, found, counts, said = precompute(files)
    assert code == 2 and not found and counts["records"] == 0
    assert "no record was made of 2 files: rejected 1 " in said
    code, _, _, again = precompute(files)
    assert code == 2 and again == said


def test_tars_and_parquet_files(precompute, tmp_path):
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/x.tar", "w") as tar:
        rows = (
            ("1.5.png", A),
            ("2.png", B),
            ("1.5.txt", b"a fox\r\n"),
            ("2.txt", b"b\n"),
        )
        for name, data in rows:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = {"image": [A, B], "Prompt": ["a hen", None], "score": [1.0, float("nan")]}
    pq.write_table(pa.table(rows), tmp_path / "in/y.parquet")
    code, found, counts, _ = precompute({}, inputs="in/*")
    wanted = {"x.tar:1.5": "a fox", "x.tar:2": "b", "y.parquet:0": "a hen"}
    assert code == 0 and found == wanted and counts["rejected"] == {"no caption": 1}


NOT_TEXT = {
    "numbers": (
        [5, 6],
        "mine holds numbers (2) and no text in any of the 2 pictures",
    ),
    "lists": ([[5], [6]], "mine holds lists of numbers (2) and no text"),
    "booleans": ([True, False], "mine holds booleans (2) and no text"),
}


@pytest.mark.parametrize("case", NOT_TEXT)
def test_a_column_that_is_no_text_is_told_from_one_that_is_not_there(precompute, case):
    values, words = NOT_TEXT[case]
    rows = [{"file_name": f"{x}.png", "mine": y} for x, y in zip("ab", values)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    files = {"a.png": A, "b.png": B, "metadata.jsonl": text}
    code, _, _, said = precompute(files, "captions=mine")
    assert code == 2 and words in said and "to make a text of other values" in said
    text = text.replace("mine", "caption")
    code, _, _, said = precompute({"metadata.jsonl": text})
    assert code == 2 and "; caption holds " in said


def test_metadata_that_is_refused_ends_the_job_at_once(precompute):
    files = {"a.png": A, "metadata.csv": 'file_name,text\na.png,"a fox\n'}
    code, _, _, said = precompute(files)
    assert code == 2 and "metadata.csv cannot be read: line 2: a quote" in said
