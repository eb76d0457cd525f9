"""From folders of pictures to records, and from these to training."""

import json
import shutil
import signal
import time

import multiprocess
import numpy as np
import pytest
import real_pictures
from parity import miniature

from sd3_jax import main
from sd3_jax.assembly import examples, precompute_plan
from sd3_jax.config import command_line
from sd3_jax.data import records, shards
from sd3_jax.distributed import sharding
from sd3_jax.monitoring import metrics
from sd3_jax.training import compile_step

TINY = "--config=configs/sd3_2b.py:tiny"  # 64 pixels
PICTURES = ["--config.precompute.only="]
KEEP = "--config.ingest.uncaptioned=keep"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred good pictures and twenty others; what is to become of the latter."""
    folder = tmp_path_factory.mktemp("pictures")
    return folder, real_pictures.make(folder, 100)


@pytest.fixture(scope="module")
def encoders():
    sizes = dict(context_dim=160, pooled_dim=128)
    given = [f"--config.model.{name}={x}" for name, x in sizes.items()]
    weights = miniature.folder("sd35_large")
    return [*given, "--config.text.length=100", f"--config.encode.weights={weights}"]


def run(job, workdir, *flags) -> int:
    return main.main([job, TINY, f"--workdir={workdir}", *map(str, flags)])


def convert(workdir, folder, *flags) -> dict:
    some = [f"--config.ingest.inputs={folder}", "--config.precompute.part=40"]
    assert run("precompute", workdir, *some, *flags) == 0
    return json.loads((workdir / "manifest.json").read_text())


def read(workdir, split="*") -> dict[str, records.Record]:
    found = {}
    for path in sorted(workdir.glob(f"records/{split}-*.arecord")):
        reader = shards.open_shard(str(path))
        for data in reader.read([*range(reader.num_records())]):
            record = records.decode(data, str(path))
            assert record.source not in found
            found[record.source] = record
            assert next(iter(record.tensors.values())).shape
    return found


def same(a: records.Record, b: records.Record) -> bool:
    """To the bit; only the order of a header's entries is not a function of these."""
    bits = lambda r: {k: (x.dtype, x.shape, x.tobytes()) for k, x in r.tensors.items()}
    return a._replace(tensors={}) == b._replace(tensors={}) and bits(a) == bits(b)


def test_every_file_is_counted_once_and_its_reason_told(folder, tmp_path, capsys):
    (folder, odd), done = folder, tmp_path / "done"
    made = convert(done, folder, "--config.image.buckets=9", KEEP, *PICTURES)
    found = read(done)
    assert made["files"] == 120 and made["records"] == len(found) == 108
    assert sum(sum(counts.values()) for counts in made["kept"].values()) == 108
    lines = map(json.loads, (done / "rejected.jsonl").read_text().splitlines())
    rejected = {line["source"]: line["reason"] for line in lines}
    assert len(rejected) == 12 and not rejected.keys() & found.keys()
    for name, reason in odd.items():
        source = f"odd/{name}"
        assert (
            source in found if reason == "kept" else reason in rejected[source].lower()
        )
    assert sum(made["rejected"].values()) == 12 and made["uncaptioned"] == 2
    printed = capsys.readouterr().out
    assert "buckets: 80x48 (0.60)" in printed and "120 files: 108 records" in printed
    for record in found.values():
        sides = record.tensors["image"].shape[:2]
        assert sides in [(80, 48), (64, 48), (64, 64), (48, 64), (48, 80)]
        _, _, h, w = record.crop
        assert abs(np.log(w / h / (sides[1] / sides[0]))) < 0.05
    assert found["odd/rotated.jpg"].size == (128, 96)  # upright
    assert found["odd/control-characters.jpg"].caption == "a  [31m"
    both = [r for s, r in found.items() if s[0].isdigit() and int(s[2:6]) % 2]
    drawn = sum(r.caption_from == "synthetic" for r in both) / len(both)
    assert 0.3 < drawn < 0.7 and all(r.caption for r in both)


def test_another_order_of_work_makes_the_same_records(folder, tmp_path):
    whole = convert(tmp_path / "a", folder[0], *PICTURES)
    flags = ["--config.precompute.threads=1", "--config.encode.rows=3"]
    convert(tmp_path / "b", folder[0], *PICTURES, *flags)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and len(whole["shards"]) == 3
    assert all(same(a[k], b[k]) for k in a)


def test_training_from_records_is_training_from_pictures(
    folder, encoders, tmp_path, monkeypatch, capsys
):
    """Bit for bit, on one device: what was computed before and what is computed now."""
    one = lambda *args, devices=None, **axes: make_mesh(devices=jax.devices()[:1])
    import jax

    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", one)
    split = "--config.precompute.held_out=0.2", KEEP
    convert(tmp_path / "stored", folder[0], *split, *encoders)
    printed = capsys.readouterr().out
    convert(tmp_path / "raw", folder[0], *split, *encoders, *PICTURES)
    losses, loads, load = {}, [], examples.encoder
    monkeypatch.setattr(examples, "encoder", lambda *x: loads.append(x) or load(*x))
    for name in "stored", "raw":
        data = {split: f"{tmp_path}/{name}/records/{split}-*" for split in TRAINED}
        flags = [f"--config.data.{key}={data[s]}" for s, key in TRAINED.items()]
        steps = ["--config.train.steps=3", "--config.train.eval_every=3"]
        given = ["--config.data.name=records", *steps, *flags, *encoders]
        if name == "raw":  # it paints with the encoder that training has
            given += ["--config.train.sample_every=3", "--config.train.prompts=a fox,"]
        assert run("train", tmp_path / f"train-{name}", *given) == 0
        rows = metrics.read(tmp_path / f"train-{name}")
        kinds = {"train": ["loss", "grad_norm"], "val": ["loss"]}
        losses[name] = [
            [row[key] for key in kinds[row["kind"]]]
            for row in rows
            if row["kind"] in kinds
        ]
    assert len(losses["raw"]) == 4 and np.isfinite(losses["raw"][:3]).all()
    assert losses["stored"] == losses["raw"]
    assert len(loads) == 1
    record = next(iter(read(tmp_path / "stored").values()))
    kinds = {name: (x.shape, x.dtype.name) for name, x in record.tensors.items()}
    assert kinds == {
        "moments": ((8, 8, 32), "float16"),
        "clip": ((77, 128), "bfloat16"),
        "t5": ((23, 160), "bfloat16"),
        "pooled": ((128,), "bfloat16"),
    }
    size = sum(x.nbytes for x in record.tensors.values())
    assert f"tensors of a record: {size:,} bytes" in printed
    assert "listed: 120 files, at most" in printed


def test_all_of_a_hosts_devices_encode(folder, encoders, tmp_path):
    made = convert(tmp_path / "done", folder[0] / "odd", KEEP, *encoders)
    found = read(tmp_path / "done")
    assert made["records"] == len(found) == 8
    assert {r.tensors["moments"].shape for r in found.values()} == {(8, 8, 32)}
    alike = [found[f"{name}.png"].tensors["moments"] for name in ("alpha", "palette")]
    assert np.abs(np.float32(alike[0]) - np.float32(alike[1])).mean() < 0.5


TRAINED = {"train": "records", "val": "held_out"}


def test_mistakes_are_one_line(folder, tmp_path, capsys):
    folder = folder[0]

    def said(*flags):
        assert run("precompute", tmp_path / "new", *flags) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    inputs = f"--config.ingest.inputs={folder}"
    assert "config.ingest.inputs = ()" in said(*PICTURES)
    assert "need a released model; set it" in said(inputs)
    assert "config.ingest.inputs: /no" in said("--config.ingest.inputs=/no", *PICTURES)
    wrong = "--config.ingest.filters=aesthetic"
    assert "config.ingest.filters: aesthetic: not a filter" in said(inputs, wrong)
    wrong = "--config.ingest.captions=a:b"
    assert 'config.ingest.captions: no module "a"' in said(inputs, wrong)
    wrong = "--config.ingest.exclude=/no.jsonl"
    assert "config.ingest.exclude: /no.jsonl" in said(inputs, wrong)
    assert "some of vae, clip_l, clip_g, t5" in said("--config.precompute.only=vea")
    done = tmp_path / "done"
    convert(done, folder, *PICTURES)
    assert run("precompute", done, inputs, "--config.seed=7", *PICTURES) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "made with other settings" in error and "precompute.part was 40, is" in error
    (tmp_path / "more").mkdir()
    real_pictures.make(tmp_path / "more" / "b", 1)
    given = [f"{inputs},{tmp_path}/more", "--config.precompute.part=40", *PICTURES]
    assert run("precompute", done, *given) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"config.ingest.inputs: {tmp_path}/more is new" in error


def test_filters_and_what_dedup_found(folder, tmp_path):
    exclude = tmp_path / "duplicates.jsonl"
    exclude.write_text(json.dumps({"source": "0/0000.jpg", "kept": "1/0001.png"}))
    flags = ["--config.ingest.filters=score>=0.5,enlarged<=1.2"]
    flags += [
        f"--config.ingest.exclude={exclude}",
        "--config.ingest.uncaptioned=reject",
    ]
    made = convert(tmp_path / "done", folder[0], *PICTURES, *flags)
    found, reasons = read(tmp_path / "done"), made["rejected"]
    assert reasons["filter score>=0.5"] > 50 and reasons["excluded"] == 1
    assert 0 < len(found) == made["records"] < 40 and made["files"] == 120
    exclude.write_text(json.dumps({"source": "0/0003.jpg", "kept": "1/0001.png"}))
    given = [f"--config.ingest.inputs={folder[0]}", "--config.precompute.part=40"]
    assert run("precompute", tmp_path / "done", *given, *PICTURES, *flags) == 2
    for record in found.values():
        assert record.crop[2] * 1.2 >= 64 or record.crop[3] * 1.2 >= 64


# Several hosts, and what they survive


SLOW = """
import time

def caption(picture, columns):
    time.sleep(0.01)
    return "seen slowly"
"""


def hosts_flags(workdir, folder, **changes):
    given = dict(inputs=folder, captions="slow:caption") | changes
    flags = [f"--config.ingest.{name}={x}" for name, x in given.items()]
    flags += [TINY, f"--workdir={workdir}", "--config.precompute.part=8", *PICTURES]
    return ["-m", "sd3_jax.main", "precompute", *flags, "--config.precompute.threads=1"]


def begun(workdir, parts: int) -> None:
    end = time.monotonic() + 60
    while len([*workdir.glob("parts/?????.json")]) < parts:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["kill", "term"])
def test_hosts_go_on_without_a_lost_or_doubled_record(
    folder, tmp_path, monkeypatch, what
):
    (tmp_path / "slow.py").write_text(SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    flags = ["--config.ingest.captions=slow:caption", "--config.precompute.part=8"]
    convert_ = [f"--config.ingest.inputs={folder[0]}", *flags, *PICTURES]
    assert run("precompute", tmp_path / "whole", *convert_) == 0
    wanted = read(tmp_path / "whole")
    seed = int.from_bytes(what.encode()) % 97
    workdir, rng = tmp_path / "hosts", np.random.default_rng(seed)
    args = hosts_flags(workdir, folder[0])
    env = {"PYTHONPATH": f"{tmp_path}:{multiprocess.ROOT}"}
    with multiprocess.start(args, devices=1, env=env) as cluster:
        begun(workdir, int(rng.integers(1, 5)))
        time.sleep(rng.uniform(0, 0.1))
        victim = cluster[int(rng.integers(2))]
        if what == "kill":
            victim.kill()
            multiprocess.kill(cluster)
        else:
            victim.send_signal(signal.SIGTERM)
            codes = [process.wait(60) for process in cluster]
            assert codes == [0, 0], [multiprocess.result(p).stderr for p in cluster]
            assert "stopping on request" in multiprocess.result(cluster[0]).stderr
    assert not (workdir / "manifest.json").exists()
    ended = multiprocess.run(args, devices=1, env=env)
    assert [x.returncode for x in ended] == [0, 0], ended[0].stderr[-3000:]
    found = read(workdir)
    assert found.keys() == wanted.keys()
    assert all(same(found[k], wanted[k]) for k in wanted)
    both = [
        json.loads((p / "manifest.json").read_text())
        for p in (workdir, tmp_path / "whole")
    ]
    for one in both:
        del one["host_seconds"], one["made_by"]
    assert both[0] == both[1]


PIXELS = "--config=configs/quickstart.py:tiny"  # of 64 pixels in patches of 16
SHAPES = ["image.height=64", "image.width=64", "image.buckets=3", "model.patch=16"]


def test_training_over_buckets_goes_on_as_if_unbroken(folder, tmp_path, monkeypatch):
    """On eight devices, three shapes: each compiled before the first step."""
    recipe = [PIXELS, *(f"--config.{key}" for key in SHAPES)]
    data, given = tmp_path / "data", f"--config.ingest.inputs={folder[0]}"
    assert main.main(["precompute", *recipe, f"--workdir={data}", given]) == 0
    assert len(json.loads((data / "manifest.json").read_text())["kept"]) == 3
    events = []

    compile_one, write = compile_step.compile_or_explain, metrics.Metrics.write

    def compiled(lowered):
        events.append("compiled")
        return compile_one(lowered)

    def written(self, step, kind, values):
        events.append(kind)
        write(self, step, kind, values)

    monkeypatch.setattr(compile_step, "compile_or_explain", compiled)
    monkeypatch.setattr(metrics.Metrics, "write", written)

    flags = [f"--config.data.records={data}/records/*", "--config.data.name=records"]
    flags += [f"--config.train.{key}_every=99" for key in ("eval", "sample")]
    flags += ["--config.train.steps=8", "--config.checkpoint.every=4"]
    workdir = tmp_path / "run"

    def trained():
        assert main.main(["train", *recipe, *flags, f"--workdir={workdir}"]) == 0
        rows = metrics.read(workdir)
        return [row["loss"] for row in rows if row["kind"] == "train"]

    whole = trained()
    assert len(whole) == 8 and np.isfinite(whole).all()
    steps = [i for i, what in enumerate(events) if what == "train"]
    assert events[: steps[0]].count("compiled") == 3 == events.count("compiled")
    shutil.rmtree(workdir / "checkpoints" / "8")  # as if killed before it was there
    assert trained() == whole


def test_no_encoder_is_one_setting_for_a_recipe_of_pixels():
    config = command_line.load("quickstart:tiny")
    default = precompute_plan.record_settings(config, None, "")
    config.precompute.only = ()
    assert default == precompute_plan.record_settings(config, None, "")
    assert default["precompute.only"] == []
