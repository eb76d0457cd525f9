"""Which steps a trace holds, wherever a run begins, ends or fails."""

from types import SimpleNamespace

import fsspec
import jax
import jax.numpy as jnp
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from sd3_jax.errors import UserError
from sd3_jax.training.profiler import Trace


def life(folder, first, last, *, fail_at=None, total=10, **span):
    """A life that does steps first .. last."""
    work, y = jax.jit(lambda x: jnp.sin(x).sum()), None
    with Trace(epath.Path(folder), **span, done=first - 1, total=total) as trace:
        for step in range(first, last + 1):
            trace.begin(step, y)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                y = work(jnp.ones(8))
            if step == fail_at:
                raise ValueError("a bug")
            if trace.ends(step):
                jax.block_until_ready(y)
                trace.stop()


def traced(folder):
    """The steps in each trace of a run."""
    found = {}
    for path in epath.Path(folder).glob("plugins/profile/*/*.xplane.pb"):
        planes = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
        events = [e for plane in planes.planes for line in plane.lines
                  for e in line.events if e.name == "train"]  # fmt: skip
        found[path.parent.name] = sorted(dict(e.stats)["step_num"] for e in events)
    return found


@pytest.mark.parametrize(
    ("first", "last", "span", "wanted"),
    [
        (1, 10, dict(start=3, steps=2), {"step_00000003": [3, 4]}),
        (1, 10, dict(start=1, steps=1), {"step_00000001": [1]}),
        (1, 10, dict(start=0, steps=2), {}),
        (1, 10, dict(start=9, steps=5), {"step_00000009": [9, 10]}),
        (4, 10, dict(start=3, steps=3), {"step_00000004": [4, 5]}),  # resumed inside
        (6, 10, dict(start=3, steps=3), {}),  # resumed behind it
        (1, 4, dict(start=3, steps=5), {"step_00000003": [3, 4]}),  # told to stop
    ],
)
def test_a_trace_holds_the_span_s_steps(tmp_path, first, last, span, wanted):
    life(tmp_path, first, last, **span)
    assert traced(tmp_path) == wanted


@pytest.mark.parametrize("platforms", ["", "tpu,cpu"])
def test_libtpu_without_a_tpu_is_told_of_before_it_crashes(monkeypatch, platforms):
    """JAX_PLATFORMS=cpu, which the tests have, keeps jax from loading it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu")
    span = dict(start=1, steps=1, done=0, total=2)
    Trace(epath.Path("unused"), **span)
    fake = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr("sd3_jax.training.profiler.jax.config", fake)
    with pytest.raises(UserError, match="set JAX_PLATFORMS=cpu"):
        Trace(epath.Path("unused"), **span)
    Trace(epath.Path("unused"), **span | dict(start=0))  # no trace is asked for
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Trace(epath.Path("unused"), **span)


def test_a_failing_run_leaves_its_trace_and_a_free_profiler(tmp_path):
    with pytest.raises(ValueError, match="a bug"):
        life(tmp_path, 1, 10, start=2, steps=5, fail_at=3)
    assert traced(tmp_path) == {"step_00000002": [2, 3]}
    life(tmp_path / "next", 1, 2, start=1, steps=1)
    assert traced(tmp_path / "next") == {"step_00000001": [1]}


def test_an_object_store_gets_the_files(monkeypatch):
    MemoryFileSystem.store.clear()
    gcs = fsspec.filesystem("memory")
    monkeypatch.setattr(
        "etils.epath.backend._FileSystemSpecBackend.fs", lambda self, path: gcs
    )
    monkeypatch.setattr("sd3_jax.files._store", lambda path: (gcs, path[4:]))
    life("gs://bucket/run/profile", 1, 3, start=2, steps=1)
    names = [name for name in MemoryFileSystem.store if "step_00000002" in name]
    assert any(name.endswith(".xplane.pb") for name in names)


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    life(tmp_path / "file", 1, 4, start=2, steps=1)
    assert "no trace in" in caplog.text
    life(tmp_path / "next", 1, 2, start=1, steps=1)
    assert traced(tmp_path / "next") == {"step_00000001": [1]}
