"""Jobs give the same results where a mesh interleaves the devices of its hosts."""

import json

import device_orders
import multiprocess
import numpy as np
import pytest
import real_pictures
from parity import miniature
from PIL import Image

from sd3_jax import metrics
from sd3_jax.data import records, shards

DIGITS = "--config=configs/quickstart.py:tiny"
PICTURES = "--config=configs/sd3_2b.py:tiny"  # 64 pixels


def job(name, recipe, workdir, *flags, **groups):
    """The arguments of one job; `groups` are of keys, by the config's own groups."""
    values = {"data.batch_size": 16}
    for group, keys in groups.items():
        values |= {f"{group}.{key}": value for key, value in keys.items()}
    return [
        *(name, recipe, f"--workdir={workdir}", *flags),
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def run_in(order, jobs, processes=1, devices=8):
    args = ["tests/device_orders.py", order, json.dumps(jobs)]
    results = multiprocess.run(
        args, processes=processes, devices=devices, timeout=500
    )
    codes = [result.returncode for result in results]
    assert codes == [0] * processes, results[0].stderr[-3000:]


# Digits: train, resume, sample, evaluate


def digit_jobs(workdir, mesh):
    quiet = dict(eval_every=100, sample_every=100)  # evaluate and sample come after
    scores = dict(pictures=16, scores="val_loss,digits,fid", features="pixels")
    return [
        job("train", DIGITS, workdir, train=dict(steps=2) | quiet, mesh=mesh),
        job("train", DIGITS, workdir, train=dict(steps=4) | quiet, mesh=mesh),
        job("sample", DIGITS, workdir, mesh=mesh),
        job("evaluate", DIGITS, workdir, mesh=mesh, eval=scores),
    ]


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir) if row["kind"] == "train"]


def samples(workdir):
    paths = sorted((workdir / "samples").glob("*.png"))
    return {path.name: np.asarray(Image.open(path)) for path in paths}


def scores(workdir):
    return json.loads((workdir / "scores.json").read_text())


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("in-order") / "run"
    run_in("in order", digit_jobs(workdir, {}))
    return workdir


@pytest.mark.parametrize(
    "order, mesh", [("v5p-16", {}), ("v5e-16", {}), ("2xv5e-16", dict(data=2))]
)
def test_digits(tmp_path, in_order, order, mesh):
    """Train, resume, sample and evaluate as one process does."""
    workdir = tmp_path / "run"
    run_in(order, digit_jobs(workdir, mesh), *device_orders.HOSTS[order])
    np.testing.assert_allclose(losses(workdir), losses(in_order), rtol=1e-5)
    painted, wanted = samples(workdir), samples(in_order)
    assert painted.keys() == wanted.keys() and len(painted) == 32
    for name, picture in wanted.items():
        np.testing.assert_array_equal(painted[name], picture, err_msg=name)
    assert scores(workdir)["scores"] == scores(in_order)["scores"]
    val_loss, wanted = (scores(path)["val_loss"] for path in (workdir, in_order))
    np.testing.assert_allclose([*val_loss.values()], [*wanted.values()], rtol=1e-5)
