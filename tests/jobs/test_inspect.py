"""What `inspect` prints and shows of shards, sound and damaged, and its exit code."""

import base64
import io
import json
import re

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from parity import miniature
from PIL import Image

from sd3_jax import main
from sd3_jax.data import records
from sd3_jax.data.records import Record
from sd3_jax.data.shards import Writer
from sd3_jax.errors import UserError
from sd3_jax.jobs import inspect
from sd3_jax.tools.inspect import inspect_page, survey

EVIL = '<script>alert("1")</script> & a fox'


def record(seed: int, height=8, width=8, kind="moments", **about) -> Record:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float16)
    tensors = {
        "moments": lambda: normal(height, width, 32),
        "latents": lambda: normal(height, width, 16),
        "image": lambda: np.full((8 * height, 8 * width, 3), seed, np.uint8),
    }
    held = {kind: tensors[kind](), "context": normal(4, 6), "pooled": normal(5)}
    given = dict(caption="a fox", caption_from="synthetic") | about
    return Record(held, f"tar/{seed}.jpg", **given)


def write(path, some) -> None:
    with Writer(path) as shard:
        for each in some:
            shard.write(each)


def damaged(path, count=6, bad=(2, 5)) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(count):
        data = records.encode(record(i))
        writer.write(data[:-1] + bytes([data[-1] ^ 1]) if i in bad else data)
    writer.close()


@pytest.fixture
def workdir(tmp_path):
    """Two buckets of training and one of validation, as precompute writes them."""
    folder = tmp_path / "records"
    square = [record(i, size=(90, 70), crop=(10, 0, 70, 70)) for i in range(20)]
    wide = [record(i, 6, 10, caption="", caption_from="") for i in range(10)]
    write(folder / "train-00000-0064x0064.arecord", square)
    write(folder / "train-00000-0048x0080.arecord", wide)
    write(folder / "val-00000-0064x0064.arecord", square[:2])
    return tmp_path


def run(workdir, *flags, **asked) -> int:
    argv = ["inspect", "--config=configs/sd3_2b.py:tiny", f"--workdir={workdir}"]
    argv += [*flags, *(f"--config.inspect.{name}={x}" for name, x in asked.items())]
    config = main.parse(argv).config
    return inspect.run(config, workdir)


def images(workdir) -> list[Image.Image]:
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", page(workdir))
    return [Image.open(io.BytesIO(base64.b64decode(x))) for x in found]


def page(workdir) -> str:
    return (workdir / "inspect.html").read_text()


def test_a_row_a_shard_and_the_sums(workdir, capsys):
    kept = {"kept": {"64x64": 22, "48x80": 10}, "rejected": {"too small": 5, "mode": 7}}
    (workdir / "manifest.json").write_text(json.dumps(kept))
    assert run(workdir) == 0
    lines = capsys.readouterr().out.splitlines()
    head, wide, square, val = lines[:4]
    assert head.split() == list(inspect.HEAD)
    holds = "moments 8x8x32 F16, context 4x6 F16, pooled 5 F16"
    assert square.split()[:2] == ["train-00000-0064x0064.arecord", "20"]
    assert square.split()[3:6] == ["64x64", "100%", "0"] and square.endswith(holds)
    assert wide.split()[3:6] == ["48x80", "0%", "0"] and val.startswith("val-00000")
    text = "\n".join(lines)
    assert "32 records in 3 shards, 0.00 GB" in text
    assert "held out: 2 of these, in 1 shard\n" in text
    assert "; by where it is from: synthetic 100%" in text
    assert "kept 32, rejected 12 (mode 7, too small 5)" in text
    assert "28 of 32 records were read; all of these are sound" in text
    assert re.search(r"48x80 +10 +31\.2%", text) and re.search(r"64x64 +22 +68", text)


def test_all_records_are_read_when_asked(workdir, capsys):
    assert run(workdir, records=0) == 0
    assert "all 32 records are sound" in capsys.readouterr().out


def test_bad_records_and_shards_are_rows(workdir, capsys):
    damaged(workdir / "records" / "train-00001-0064x0064.arecord")
    (workdir / "records" / "train-00002-0064x0064.arecord").write_bytes(b"nonsense")
    (workdir / "records" / "train-00003-0064x0064.arecord").write_bytes(b"")
    assert run(workdir, records=0) == 1
    out = capsys.readouterr().out
    assert "  bad: checksum 2\n" in out and out.count("  bad: not readable 1\n") == 2
    assert "2 of the 38 records that were read are bad; 2 of 6 shards cannot" in out
    assert re.search(
        r"\n  \S*train-00001-0064x0064.arecord:5: checksum: .*expected", out
    )
    assert "train-00003-0064x0064.arecord: has 0 bytes" in out
    assert "train-00003-0064x0064.arecord: has 0 bytes" in page(workdir)
    assert len(images(workdir)) == 36  # the good ones


def test_other_hands_records_are_no_crash(tmp_path, capsys):
    path = tmp_path / "records" / "a.arecord"
    path.parent.mkdir()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for data in (b"", b"{", 9 * b"\xff", records.encode(record(0))[:200]):
        writer.write(data)
    writer.close()
    assert run(tmp_path) == 1
    assert "bad: not a record 4" in capsys.readouterr().out
    assert "data:image" not in page(tmp_path)


def test_many_shards_are_folded_by_bucket(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect, "FOLD", 3)
    for i in range(5):
        name = f"train-{i:05}-0064x0064.arecord"
        write(tmp_path / "records" / name, [record(i)])
    damaged(tmp_path / "records" / "train-00009-0064x0064.arecord")
    assert run(tmp_path, records=0) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 shards, folded by bucket (--config.inspect.shards=true)"
    assert lines[2].split()[:3] == ["6", "shards", "11"] and "64x64" in lines[2]
    assert lines[3] == "  bad: checksum 2"
    assert run(tmp_path, records=0, shards=True) == 1
    assert capsys.readouterr().out.count("\ntrain-0000") == 6


def test_shards_are_those_of_the_recipe(workdir, tmp_path, capsys):
    other = tmp_path / "elsewhere"
    one = f"--config.data.records={workdir}/records/train*64x0064.arecord"
    two = f"--config.data.held_out={workdir}/records/train*80.arecord"
    assert run(other, one, two) == 0
    out = capsys.readouterr().out
    assert "30 records in 2 shards" in out and "held out: 10 of these" in out
    assert str(workdir) in page(other)
    with pytest.raises(
        UserError, match="matches no file; expected config.data.records"
    ):
        run(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("no shard")
    for name, reason in ("absent", "cannot be read"), ("notes.txt", "not a shard"):
        with pytest.raises(UserError, match=f"none of the 1 file .*{name}: {reason}"):
            run(tmp_path / "bad", f"--config.data.records={tmp_path}/{name}")


def test_the_page_holds_pictures_of_every_bucket(workdir):
    assert run(workdir, pictures=6) == 0
    assert [image.size for image in images(workdir)] == 3 * [(320, 320)] + 3 * [
        (320, 192)
    ]
    text = page(workdir)
    assert "90 × 70 px, crop 70 × 70 at 10, 0" in text and "<svg " in text
    assert "no caption" in text and "original size unknown" in text
    assert "src=" not in re.sub(r'src="data:[^"]+"', "", text)  # all is in it
    run(workdir, pictures=0)
    assert not images(workdir)


def test_captions_are_text_and_not_markup(tmp_path):
    some = [record(i, caption=EVIL, caption_from=EVIL) for i in range(3)]
    write(tmp_path / "records" / "<b>.arecord", some)
    assert run(tmp_path) == 0
    text = page(tmp_path)
    assert "<script" not in text and "<b>" not in text
    assert "&lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt; &amp; a fox" in text


def test_an_image_is_shown_as_it_is(tmp_path):
    write(tmp_path / "records" / "a.arecord", [record(200, kind="image")])
    assert run(tmp_path) == 0
    (image,) = images(tmp_path)
    assert (
        image.size == (320, 320) and abs(np.asarray(image).astype(int) - 200).max() < 3
    )


def test_latents_are_decoded_by_the_weights_that_are_given(tmp_path):
    both = [record(1), record(2, kind="latents"), record(3, 4, 6)]
    for i, each in enumerate(both):
        write(tmp_path / "records" / f"{i}.arecord", [each])
    flags = f"--config.weights={miniature.folder('sd35_medium')}"
    assert run(tmp_path, flags) == 0
    decoded = images(tmp_path)
    assert "decoded by " in page(tmp_path) and len(decoded) == 3
    # The key by which the encoders of the records are named serves as well.
    assert run(tmp_path, flags.replace("config.weights", "config.encode.weights")) == 0
    assert images(tmp_path) == decoded and "decoded by " in page(tmp_path)
    assert run(tmp_path) == 0
    assert "rough preview; --config.encode.weights names" in page(tmp_path)
    assert (np.asarray(decoded[0]) != np.asarray(images(tmp_path)[0])).any()


def test_previews_of_any_number_of_channels():
    for channels in (1, 2, 3, 4, 16):
        x0 = np.full((4, 4, channels), 2.0, np.float32)
        made = inspect_page.picture(Record({"latents": x0}, "x"))
        assert made.shape == (4, 4, 3) and made.dtype == np.uint8
    x0 = np.full((4, 4, 16), 3e38, np.float32)  # finite, and its sums are not
    assert inspect_page.picture(Record({"latents": x0}, "x")).shape == (4, 4, 3)


@pytest.mark.parametrize("text", ["", "[", "[1]", '{"kept": null, "rejected": [3]}'])
def test_a_manifest_is_not_believed(workdir, text):
    (workdir / "manifest.json").write_text(text)
    assert run(workdir) == 0


def test_what_is_read_is_spread_evenly():
    assert survey.spread(100, 3) == [0, 50, 99]
    assert list(survey.spread(5, 0)) == list(survey.spread(5, 9)) == list(range(5))
    assert survey.spread(5, 1) == [0] and len(set(survey.spread(17, 16))) == 16


def test_memory_does_not_grow_with_what_is_bad():
    total = survey.Tally("all")
    for i in range(500):
        one = survey.Tally(str(i), shards=1)
        one.fault(UserError(f"{i}: x"), f"reason {i}")
        one.saw(record(0, caption_from=f"by {i}"))
        total.add(one)
    assert total.bad_count == 500 and len(total.bad) == survey.LISTED
    assert len(total.reasons) <= survey.KINDS + 1 and sum(total.reasons.values()) == 500
    assert len(total.made_by) <= survey.KINDS + 1
    choice = survey.Choice(4)
    for i in range(1000):
        choice.offer("a", i, f"{8 + i % 300}x8")
        choice.offer("a", i, "8x8")
    assert len(choice.chosen()) == 4 and len(choice._kept) <= survey.BUCKETS
