"""Jobs give the same results where a mesh interleaves the devices of its hosts."""

import json

import device_orders
import multiprocess
import numpy as np
import pytest
import real_pictures
from parity import miniature
from PIL import Image

from sd3_jax import main
from sd3_jax.data import records, shards
from sd3_jax.monitoring import metrics

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
    results = multiprocess.run(args, processes=processes, devices=devices, timeout=500)
    codes = [result.returncode for result in results]
    assert codes == [0] * processes, results[0].stderr[-3000:]


# Digits: train, resume, sample, evaluate


def digit_jobs(workdir, mesh):
    quiet = dict(eval_every=100, sample_every=100)  # evaluate and sample come after
    longer = dict(steps=4, changes="train.steps")
    scores = dict(pictures=16, scores="val_loss,digits,fid", features="pixels")
    return [
        job("train", DIGITS, workdir, train=dict(steps=2) | quiet, mesh=mesh),
        job("train", DIGITS, workdir, train=longer | quiet, mesh=mesh),
        job("sample", DIGITS, workdir, mesh=mesh),
        job("evaluate", DIGITS, workdir, mesh=mesh, eval=scores),
    ]


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir) if row["kind"] == "train"]


def samples(workdir):
    paths = sorted((workdir / "samples").glob("*.png"))
    return {path.name: np.asarray(Image.open(path)) for path in paths}


def numbers(workdir):
    """Every score and validation loss, by name."""
    found = json.loads((workdir / "scores.json").read_text())
    scores = {row["name"]: row["score"] for row in found["scores"]}
    return scores | found["val_loss"]


@pytest.fixture(scope="module")
def in_order(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("in-order") / "run"
    run_in("in order", digit_jobs(workdir, {}))
    return workdir


@pytest.mark.parametrize(
    "order, mesh",
    [
        ("v5p-16", {}),
        pytest.param("v5e-16", {}, marks=pytest.mark.slow),
        pytest.param("2xv5e-16", dict(data=2), marks=pytest.mark.slow),
    ],
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
    assert numbers(workdir) == pytest.approx(numbers(in_order), rel=1e-6)


# Pictures: precompute, and train with the encoders in the step


def picture_jobs(workdir, folder, raw):
    sizes = dict(context_dim=160, pooled_dim=128)  # of the miniature's text encoders
    encoders = dict(
        model=sizes,
        text=dict(length=100),
        encode=dict(weights=miniature.folder("sd35_large"), rows=1),
    )
    ingest = dict(inputs=folder)
    precompute = dict(part=8)  # a few for each host
    data = dict(name="records", records=raw / "records" / "*")
    train = dict(steps=2, eval_every=100, sample_every=100)
    # Each device has whole weights: bfloat16 sums over shards depend on their number.
    ready = dict(ingest=ingest, precompute=precompute, mesh=dict(data=-1, fsdp=1))
    trained = dict(data=data, train=train)
    return [
        job("precompute", PICTURES, workdir / "encoded", **ready, **encoders),
        job("train", PICTURES, workdir / "run", **trained, **encoders),
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of pictures, and a workdir with records of them, not encoded."""
    folder, raw = map(tmp_path_factory.mktemp, ("pictures", "raw"))
    real_pictures.make(folder, 24)
    ingest, none = dict(inputs=folder), "--config.precompute.only="
    assert main.main(job("precompute", PICTURES, raw, none, ingest=ingest)) == 0
    return folder, raw


@pytest.fixture(scope="module")
def pictures_in_order(tmp_path_factory, inputs):
    workdir = tmp_path_factory.mktemp("pictures-in-order")
    run_in("in order", picture_jobs(workdir, *inputs))
    return workdir


@pytest.mark.slow  # test_digits has the same promise, of other jobs
@pytest.mark.parametrize("order", ["v5p-16", "v5e-16", "2xv5e-16"])
def test_pictures(tmp_path, pictures_in_order, inputs, order):
    """Precompute, and train with the encoders in the step, as one process does."""
    run_in(order, picture_jobs(tmp_path, *inputs), *device_orders.HOSTS[order])
    wanted, found = losses(pictures_in_order / "run"), losses(tmp_path / "run")
    assert len(found) == 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    wanted, found = (stored(path / "encoded") for path in (pictures_in_order, tmp_path))
    assert found.keys() == wanted.keys() and len(found) > 24
    assert all(found[source] == wanted[source] for source in wanted)


def stored(workdir):
    """Of each record by its source the tensors' bits and all that is not one."""
    found = {}
    for path in sorted(workdir.glob("records/*.arecord")):
        reader = shards.open_shard(str(path))
        for data in reader.read([*range(reader.num_records())]):
            record = records.decode(data, str(path))
            bits = {k: (x.shape, x.tobytes()) for k, x in record.tensors.items()}
            found[record.source] = record._replace(tensors=bits)
    return found
