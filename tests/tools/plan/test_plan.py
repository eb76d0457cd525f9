"""plan on a miniature: rows, what does not fit, and how gradients leave the layers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sd3_jax.tools.plan import aot, bounds, hlo, slices
from sd3_jax.tools.plan.schedule import usual_branch

ROOT = Path(__file__).parents[3]
SMALL = {  # narrower, XLA sums the small weights' gradients whole
    "model.depth": 3,
    "model.width": 768,
    "model.num_heads": 12,
    "plan.slices": "v5e-16",
    "plan.per_chip": 4,
    "plan.hlo": "true",
}


def plan(workdir, **keys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    flags = [f"--config.{key}={value}" for key, value in (SMALL | keys).items()]
    run = [sys.executable, "-m", "sd3_jax.main", "plan"]
    run += ["--config=configs/sd3_2b.py:256", f"--workdir={workdir}", *flags]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    del env["XLA_FLAGS"]  # libtpu ends where one is for CPUs
    return subprocess.run(
        run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plan")
    done = plan(workdir)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((workdir / "plan.json").read_text())
    png = (workdir / "plan.png").read_bytes()
    return row, done.stdout, png, (workdir / "plan-v5e-16-train.hlo").read_text()


def test_a_row(planned):
    row, printed, png, _ = planned
    assert row["mesh"] == {"data": 1, "fsdp": 16, "context": 1, "tensor": 1}
    assert row["batch"] == 4 and 0 < row["peak"] < row["capacity"]
    assert row["verdict"] == "fits" and row["compiler"].startswith("libtpu ")
    assert 0 < row["mfu_scheduled"] <= row["mfu"] < 1
    assert bounds.FLOORS[max(bounds.FLOORS, key=row.get)] == row["binds"]
    assert row["compute"] <= row["serial"] <= row["scheduled"]
    assert sum(row["shares"].values()) == pytest.approx(row["scheduled"])
    assert row["forecast_mfu"][1] < row["mfu"] and row["forecast_rate"][1] < row["rate"]
    assert "v5e-16" in printed and "bound MFU" in printed and "forecast" in printed
    assert "--config.data.batch_size=64" in printed  # trains what was planned
    assert png.startswith(b"\x89PNG")


def test_products_are_those_that_the_model_counts(planned):
    """With remat; the first maps' inputs want no gradient, which the count ignores."""
    row, *_ = planned
    assert row["compute"] == pytest.approx(sum(row["products"].values()), rel=0.05)


def test_gradients_leave_the_layers_scattered(planned):
    """A tenth of all bytes by all-reduce, and little more than FSDP must send."""
    row, *_ = planned
    assert row["all_reduced"] <= 0.1 * sum(row["sent_bytes"].values())
    assert row["sent_over_least"] <= 1.25  # whole tiles: 48 numbers fill 128 lanes


def test_modulation_sends_rows_and_not_its_weights(planned):
    """Gathered, adaLN's weights would be a quarter of all bytes."""
    row, *_ = planned
    assert row["adaln_bytes"] > 0
    # The sum of c's gradient loses its source where XLA joins all-reduces.
    sent = row["adaln_bytes"] + row["all_reduced"]
    assert sent <= 0.03 * sum(row["sent_bytes"].values())


def test_no_buffer_of_heads_x_tokens_x_tokens(planned):
    tokens = {256 + 154, 512}  # as they are, and as the kernel pads them
    for sides in re.findall(r"\[([\d,]+)\]", planned[3]):
        long = [n for n in sides.split(",") if int(n) in tokens]
        assert len(long) < 2, sides


def test_what_does_not_fit_is_a_row(tmp_path):
    tiny = {"model.width": 256, "model.num_heads": 4, "plan.slices": "v5e-4"}
    done = plan(tmp_path, **tiny, **{"plan.per_chip": 4096})
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    assert row["needs"].endswith("of 15.75G")
    assert "does not fit: needs" in done.stdout


@pytest.mark.parametrize(
    "peak, verdict", [(14.0, "fits"), (14.6, "fits"), (14.7, "tight"), (15.7, "tight")]
)
def test_memory_wants_a_margin(peak, verdict):
    assert bounds.verdict(peak, 15.75) == verdict


def test_flags_of_a_job():
    ring = "xla_jf_spmd_threshold_for_windowed_einsum_mib"
    flags = lambda name, job: aot.flags(ROOT / "launch/flags", slices.find(name), job)
    assert ring in flags("v6e-8", "sample") and ring not in flags("v6e-8", "train")
    assert flags("v6e-8", "train").items() <= flags("v6e-8", "sample").items()
    assert flags("v5e-8", "sample") == flags("v5e-8", "train") != {}


def test_the_branch_that_most_steps_take():
    lengths = {"keep": 3, "update": 200}
    x = lambda source: hlo.Instruction(
        "c", (), "conditional", (), f'metadata={{op_name="{source}"}}'
    )
    assert usual_branch(x("jit(step)/cond"), lengths) == "update"
    assert usual_branch(x("jit(step)/ema/cond"), lengths) == "keep"
