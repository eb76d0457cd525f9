"""plan on a miniature: rows, what does not fit, and how gradients leave the layers."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    assert 0 < row["mfu"] < 1
    assert max(("compute", "memory", "links"), key=row.get) == row["binds"]
    assert sum(row["shares"].values()) == pytest.approx(row["compute"])
    assert sum(row["links_by_axis"].values()) == pytest.approx(row["links"])
    assert "v5e-16" in printed and "bound MFU" in printed and "padding 3%" in printed
    assert png.startswith(b"\x89PNG")


def test_gradients_leave_the_layers_scattered(planned):
    """At most a tenth of their bytes by all-reduce, and no more sent than FSDP must."""
    row, _, _, text = planned
    from sd3_jax.plan import hlo

    found = hlo.collectives(text, row["mesh"])
    back = [x for x in found if "transpose" in x.source]
    summed = sum(x.total for x in back if x.kind == "all-reduce")
    assert summed <= 0.1 * sum(x.total for x in back)
    assert row["sent_over_least"] <= 1.15
    assert row["gathers_overlapped"] > 0.75  # beside matrix products, or rings in them


def test_modulation_sends_rows_and_not_its_weights(planned):
    """Gathered, adaLN's weights would be a quarter of all bytes."""
    row, _, _, text = planned
    from sd3_jax.plan import hlo

    found = hlo.collectives(text, row["mesh"])
    # The sum of c's gradient loses its source where XLA joins all-reduces.
    ours = [x for x in found if "adaln" in x.source]
    joined = [x for x in found if x.kind == "all-reduce" and not x.source]
    assert ours
    assert sum(x.total for x in ours + joined) <= 0.03 * sum(x.total for x in found)


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
