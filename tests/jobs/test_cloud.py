"""Runs with a workdir or input in a bucket: an emulator that refuses, stalls, cuts."""

import io
import itertools
import json
import signal
import subprocess
import sys
import tarfile
import time
from urllib.parse import unquote

import cloud_storage
import multiprocess
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from sd3_jax import main
from sd3_jax.data import records, shards

pytest.importorskip("gcsfs")
TINY = ["--config=quickstart:tiny", "--workdir=gs://emulated/run"]
FEW = [f"--config.train.{key}_every=99" for key in ("sample", "eval")]
TRAIN = ["train", *TINY, *FEW, "--config.checkpoint.every=2"]
FAULTS = {3: 429, 8: 503, 13: "slow", 17: "cut"}  # by number of a request


def faulty(every=63):
    """Four faults in so many requests; after most gcsfs waits for a second or two."""
    count = itertools.count()
    return lambda method, path: FAULTS.get(next(count) % every)


@pytest.fixture(scope="module")
def bucket():
    with cloud_storage.serving() as bucket:
        yield bucket


def start(bucket, *argv):
    env = multiprocess.environment(1, 1) | bucket.environment
    env = {k: v for k, v in env.items() if not k.startswith("SD3_")}
    return subprocess.Popen(
        [sys.executable, "-m", "sd3_jax.main", *argv],
        cwd=multiprocess.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(bucket, *argv):
    process = start(bucket, *argv)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, out[-3000:]
    return out


def losses(bucket):
    lines = map(json.loads, bucket.objects["run/metrics.jsonl"].data.splitlines())
    return {x["step"]: x["loss"] for x in lines if x["kind"] == "train"}


LOOKS = """
import os, urllib.request
from sd3_jax import main
from sd3_jax.data import records, shards
main.list_buckets_anew()
from etils import epath
from sd3_jax import files
from sd3_jax.checkpoints import step_folders
run = epath.Path("gs://emulated/looks")
assert files.children(run) == []
step_folders.prepare(run)  # no folder is there, and none must be
folder = step_folders.folder_identity(run)
(run / "a").write_text("1")
def another(method, path):
    request = os.environ["STORAGE_EMULATOR_HOST"] + path
    urllib.request.urlopen(urllib.request.Request(request, b"", method=method)).read()
for _ in range(2):
    assert [x.name for x in files.children(run)] == ["a"]
    assert files.sizes(run) == {"a": 1} and files.sizes(run / "nowhere") == {}
    upload = "/upload/storage/v1/b/emulated/o?uploadType=media&name="
    another("POST", upload + "looks/2/commit_success.txt")
    assert step_folders.complete_steps(run) == [2] and (run / "2").is_dir()
    another("DELETE", "/storage/v1/b/emulated/o/looks%2F2%2Fcommit_success.txt")
    assert step_folders.complete_steps(run) == [] and not (run / "2").exists()
assert step_folders.folder_identity(run) == folder
"""


def test_what_another_writes_into_a_bucket_is_seen(bucket):
    bucket.fault = lambda method, path: None
    done = subprocess.run(
        [sys.executable, "-c", LOOKS],
        cwd=multiprocess.ROOT,
        env=multiprocess.environment(1, 1) | bucket.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_on_a_bucket_survives_faults_and_a_kill(bucket):
    bucket.fault = faulty()
    killed = start(bucket, *TRAIN, "--config.train.steps=400")
    deadline = time.monotonic() + 300
    saved = lambda: [x for x in bucket.objects if "commit_success" in x]
    while not saved() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    assert saved(), killed.communicate()[0][-3000:]
    killed.communicate()
    newest = max(int(x.split("/")[2]) for x in saved())
    total = newest + 2
    changed = [f"--config.train.steps={total}", "--config.train.changes=train.steps"]
    out = run(bucket, *TRAIN, *changed)
    assert f"resuming from step {newest}" in out
    assert {newest + 1, total} <= set(losses(bucket))  # lines go there every 30 s
    kept = {int(x.split("/")[2]) for x in saved()}
    assert max(kept) == total and len(kept) <= 3 + 1  # one more may be on its way out


def test_pictures_and_weights_of_a_run_on_a_bucket(bucket):
    bucket.fault = faulty()
    run(bucket, "sample", *TINY, "--config.sample.prompt=a red one")
    (line,) = bucket.objects["run/samples.jsonl"].data.splitlines()
    picture = bucket.objects[f"run/{json.loads(line)['file']}"].data
    assert picture.startswith(b"\x89PNG")
    run(bucket, "convert", *TINY, "--config.convert.to=orbax")
    assert any("orbax" in name for name in bucket.objects)


MAKE = ["--config=quickstart:tiny", "--config.precompute.only="]
MAKE += ["--config.precompute.part=2", "--config.ingest.uncaptioned=keep"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        pixels = np.full((64, 64, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def content(path):
    """Of records all but the order of their headers' entries, which varies."""
    reader = shards.open_shard(str(path))
    rows = reader.read([*range(reader.num_records())])
    decoded = [records.decode(row, str(path)) for row in rows]
    bits = lambda r: {k: (x.shape, x.tobytes()) for k, x in r.tensors.items()}
    return [(bits(r), r._replace(tensors={})) for r in decoded]


def test_records_on_a_bucket(bucket, pictures, tmp_path):
    """Killed between a shard and the file that commits it, and started again, they are
    those of a local folder; and training reads them where they are."""
    more = [*MAKE, f"--config.ingest.inputs={pictures}"]
    assert main.main(["precompute", *more, f"--workdir={tmp_path}"]) == 0

    killed, second = [], "data/records/train-00001-8x8.arecord"

    def kill(method, path):  # once the shard is there and is looked at
        if second in unquote(path) and second in bucket.objects:
            killed[0].send_signal(signal.SIGKILL)

    bucket.fault = kill
    killed.append(start(bucket, "precompute", *more, "--workdir=gs://emulated/data"))
    out, _ = killed[0].communicate(timeout=300)
    parts = lambda: sorted(x for x in bucket.objects if "data/parts" in x)
    assert killed[0].returncode == -signal.SIGKILL, out[-3000:]
    assert "data/parts/00000.json" in parts()
    assert "data/parts/00001.json" not in parts()

    bucket.fault = faulty(every=63)
    run(bucket, "precompute", *more, "--workdir=gs://emulated/data")
    stored = [x for x in bucket.objects if x.startswith("data/records/")]
    local = sorted((tmp_path / "records").iterdir())
    assert sorted(x.split("/")[2] for x in stored) == [x.name for x in local]
    for path in local:
        data = bucket.objects[f"data/records/{path.name}"].data
        (tmp_path / path.name).write_bytes(data)
        assert content(tmp_path / path.name) == content(path)
    manifest = bucket.objects["data/manifest.json"].data
    untimed = lambda data: json.loads(data) | {"host_seconds": 0}
    assert untimed(manifest) == untimed((tmp_path / "manifest.json").read_bytes())

    train = ["train", "--config=quickstart:tiny", *FEW, "--config.train.steps=2"]
    train += ["--config.data.name=records", "--workdir=gs://emulated/of_records"]
    train += ["--config.data.records=gs://emulated/data/records/train-*"]
    run(bucket, *train, "--config.data.batch_size=2")
    assert any("of_records/checkpoints/2/" in name for name in bucket.objects)


INPUTS = """
import os, sys
from sd3_jax import main
main.list_buckets_anew()
from sd3_jax.data.ingest import input_parts as ingest
from sd3_jax.data.ingest.items import Item
def rows(root, names):
    for part in ingest.plan([f"{root}/{name}" for name in names], size=3):
        for item in ingest.items(part):
            taken = isinstance(item, Item)
            yield (item.source, item.columns, item.read()) if taken else item[:2]
local, names = sys.argv[1], sys.argv[2:]
for name in names:
    there = list(rows("gs://emulated/inputs", [name]))
    here = list(rows(local, [name]))
    assert there == here, (there, here)
    print(name, len(there), sum(len(row) == 3 for row in there))
several = names[2:]
assert [*rows("gs://emulated/inputs", several)] == [*rows(local, several)]
"""


def test_pictures_in_a_bucket_are_those_of_a_folder(bucket, pictures, tmp_path):
    names = sorted(path.name for path in pictures.iterdir())
    data = {name: (pictures / name).read_bytes() for name in names}
    files = {f"sidecars/{name}": x for name, x in data.items()}
    files |= {"sidecars/0.txt": b"zero", "sidecars/1.json": b'{"score": 5}'}
    files |= {"sidecars/sub/0.png": data["0.png"], "sidecars/.hidden": b"x"}
    files |= {"sidecars/2.txt": b"\xff", "sidecars/notes.md": b"a"}
    files |= {f"lines/{name}": x for name, x in data.items()}
    rows = [{"file_name": name, "text": f"of {name}"} for name in [*names, "gone.png"]]
    files["lines/metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    files |= {f"table/sub/{name}": x for name, x in data.items()}
    table = [f"sub/{name},of {name},{i}" for i, name in enumerate(names)]
    files["table/metadata.csv"] = "\n".join(["file_name,text,n", *table]).encode()
    for name in "a.tar", "b.tar":
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for member, x in [*data.items(), ("0.txt", b"zero")]:
                about = tarfile.TarInfo(member)
                about.size = len(x)
                tar.addfile(about, io.BytesIO(x))
        files[name] = packed.getvalue()
    columns = {"image": [{"bytes": x} for x in data.values()], "text": names}
    packed = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), packed)
    files["a.parquet"] = packed.getvalue()
    for name, x in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(x)
        bucket.put(f"inputs/{name}", x, None)
    bucket.fault = faulty(every=63)
    inputs = ["sidecars", "lines", "table", "?.tar", "a.parquet"]
    done = subprocess.run(
        [sys.executable, "-c", INPUTS, tmp_path, *inputs],
        cwd=multiprocess.ROOT,
        env=multiprocess.environment(1, 1) | bucket.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [line.split()[1:] for line in done.stdout.splitlines()]
    assert counts == [["6", "4"], ["5", "4"], ["4", "4"], ["8", "8"], ["4", "4"]]


def picture(shade):
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 90, 10)).save(data, "PNG")
    return data.getvalue()


def test_precompute_reads_a_bucket(bucket, tmp_path):
    bucket.fault = lambda method, path: None
    rows = "file_name;text\nd\\0.png;a fox\nd/1.png;42\n".encode("utf-16")
    files = {"set/d/0.png": picture(0), "set/d/1.png": picture(1)}
    files |= {"set/metadata.csv": rows, "set/d/1.txt": b" "}
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name, data in ("1.jpg", picture(2)), ("1.txt", b"a hen"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    parquet.write_table(
        pyarrow.table({"jpg": [picture(3)], "caption": ["a cat"]}), table
    )
    files |= {"tars/0.tar": tar.getvalue(), "tars/0.parquet": table.getvalue()}
    for name, data in files.items():
        bucket.put(name, data, None)
    inputs = "gs://emulated/set,gs://emulated/tars/*.tar,gs://emulated/tars/*.parquet"
    flags = f"--config.ingest.inputs={inputs}", "--config.precompute.only="
    tiny = "--config=configs/sd3_2b.py:tiny"
    for _ in range(2):  # to begin with, and when all is done
        out = run(bucket, "precompute", tiny, f"--workdir={tmp_path}", *flags)
        assert "4 files: 4 records, 0 rejected" in out and "caption 4" in out
