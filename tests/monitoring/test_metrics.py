"""Lines that survive kills, resumes and NaN."""

import io
import json
import math
import sys
import time
from types import SimpleNamespace

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from sd3_jax import files
from sd3_jax.errors import RetryableError
from sd3_jax.monitoring import metrics, tensorboard
from sd3_jax.monitoring.metrics import Clock, Metrics, read
from sd3_jax.monitoring.tensorboard import EventFiles


def steps(workdir):
    return [row["step"] for row in read(workdir)]


def train(workdir, first, last, **kwargs):
    with Metrics(workdir, total_steps=10, start_step=first - 1, **kwargs) as log:
        for step in range(first, last + 1):
            log.write(step, "train", {"loss": 1 / step})


def test_a_line_reads_back_as_written(tmp_path):
    values = dict(loss=jnp.float32(0.5), n=3, path="a.png", prompts=["nan", "é"])
    with Metrics(tmp_path, total_steps=10) as log:
        log.write(4, "val", values)
    (row,) = read(tmp_path)
    assert abs(row.pop("time") - time.time()) < 60
    assert row == dict(step=4, kind="val", loss=0.5, n=3, path="a.png") | dict(
        prompts=["nan", "é"]
    )


def test_nan_and_infinities_stay_json(tmp_path):
    with Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"a": jnp.nan, "b": np.float32(-np.inf), "c": math.inf})
    text = (tmp_path / metrics.FILE).read_text()
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    assert json.loads(text, parse_constant=refuse)["b"] == "-inf"
    (row,) = read(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == -math.inf and row["c"] == math.inf


def test_each_line_is_on_disk_at_once(tmp_path):
    with Metrics(tmp_path, total_steps=10) as log:
        log.write(1, "train", {"loss": 1.0})
        assert steps(tmp_path) == [1]


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path):
    train(tmp_path, 1, 7)
    train(tmp_path, 5, 9)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_an_evaluation_only_adds(tmp_path):
    train(tmp_path, 1, 7)
    with Metrics(tmp_path, total_steps=10, start_step=None) as log:
        log.write(3, "score", {"reader": 0.9})
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7, 3]


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_cut_last_line_goes_and_the_others_stay(tmp_path, cut):
    train(tmp_path, 1, 4)
    path = tmp_path / metrics.FILE
    path.write_bytes(path.read_bytes()[:-cut])
    whole = [1, 2, 3, 4] if cut == 1 else [1, 2, 3]  # 1 cuts only the line's end
    assert steps(tmp_path) == whole
    train(tmp_path, 5, 6)
    assert steps(tmp_path) == [*whole, 5, 6]


def test_damage_is_passed_over(tmp_path):
    train(tmp_path, 1, 3)
    path = tmp_path / metrics.FILE
    path.write_bytes(b"\x00\xff{\n[1]\n{}\n" + path.read_bytes())
    assert steps(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    "name, value",
    [("step", x) for x in ("x", None, 1e30, True, -1)]
    + [("kind", 3), ("time", "now"), ("time", None)],
)
def test_a_line_of_other_types_is_counted_and_left_out(tmp_path, caplog, name, value):
    train(tmp_path, 1, 2)
    row = {"step": 1, "kind": "train", "time": 1.0, name: value}
    path = tmp_path / metrics.FILE
    path.write_text(f"{json.dumps(row)}\n{path.read_text()}")
    assert steps(tmp_path) == [1, 2]
    assert "ignored lines that are not metrics: 1" in caplog.text
    train(tmp_path, 3, 3)  # a resumed run reads them too
    assert steps(tmp_path) == [1, 2, 3]


def test_only_process_0_writes(tmp_path):
    train(tmp_path / "run", 1, 3, process_index=1)
    assert not (tmp_path / "run").exists() and read(tmp_path) == []


def test_tensorboard_gets_the_numbers(tmp_path):
    train(tmp_path, 1, 3)
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_plain_line_when_piped(tmp_path, capsys):
    values = dict(loss=0.1234, grad_norm=0.56, lr=1e-4, images_per_s=812.2)
    values |= dict(step_ms=98.2, data_wait=0.02)
    with Metrics(tmp_path, total_steps=6_000) as log:
        log.write(400, "train", values)
        log.write(400, "val", {"loss": 0.3})
    lines = capsys.readouterr().err.splitlines()
    words = "loss 0.1234  grad 0.56  812 img/s  98.2 ms/step  wait 2%"
    assert lines == [f"step  400/6000  {words}", "step  400/6000  val  loss 0.3"]


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Metrics(tmp_path, total_steps=10, start_step=4) as log:
        log.write(5, "train", {"loss": 0.5})
        log.write(5, "val", {"loss": 0.25})
    assert "loss 0.5000" in terminal.getvalue() and "val" in terminal.getvalue()
    assert "5/10" in terminal.getvalue()


def test_an_object_store_gets_the_whole_file(monkeypatch, capsys):
    MemoryFileSystem.store.clear()
    gcs = fsspec.filesystem("memory")
    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend.fs", lambda self, path: gcs
    )
    monkeypatch.setattr(files, "_store", lambda path: (gcs, path))
    monkeypatch.setattr(metrics.EventFiles, "add", lambda *_: None)
    train("gs://bucket/run", 1, 7)
    train("gs://bucket/run", 5, 6)
    assert steps("gs://bucket/run") == [1, 2, 3, 4, 5, 6]


def test_a_failed_write_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "page"
    files.write_whole(path, b"old")
    fail = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    monkeypatch.setattr("etils.epath.backend._OsPathBackend.replace", fail)
    with pytest.raises(OSError):
        files.write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_the_clock_tells_work_from_waiting(monkeypatch):
    now = iter([0.0, 1.0, 2.0, 10.0, 10.0, 14.0, 14.0])
    watch = SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr(metrics, "time", watch)
    clock = Clock()  # at 0
    with clock.wait():  # 1 to 2
        pass
    rates = clock.summary(steps=5, images=50, flops=40e12, devices=2, peak=4.0)
    assert rates == dict(images_per_s=5.0, step_ms=2000.0, data_wait=0.1) | dict(
        tflops_per_device=2.0, mfu=0.5
    )
    assert clock.summary(1, 8) == dict(images_per_s=2, step_ms=4000, data_wait=0)


def test_tensorboard_in_a_bucket(monkeypatch, caplog):
    """Event files are put there whole; a bucket that refuses them ends no run."""
    stored = {}
    monkeypatch.setattr(files, "write_object", stored.__setitem__)
    events = EventFiles("gs://bucket/run", start_step=0)
    events.add("train", {"loss": 1.0}, 1)
    assert not stored  # only twice a minute, and at the end
    events.close()
    ((name, data),) = stored.items()
    assert name.startswith("gs://bucket/run/tensorboard/events.") and b"loss" in data

    def refuse(path, data):
        raise RetryableError(f"{path}: cannot be written: 412")

    monkeypatch.setattr(files, "write_object", refuse)
    monkeypatch.setattr(tensorboard, "UPLOAD_EVERY", -1.0)
    events = EventFiles("gs://bucket/run", start_step=0)
    for step in range(30):
        events.add("train", {"loss": 1.0}, step)
    events.close()
    assert caplog.text.count("writing no more TensorBoard files") == 1
