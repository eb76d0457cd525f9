"""Going on with a run: with other settings, other examples, on other devices."""

import logging
import shutil
from types import SimpleNamespace

import jax
import multiprocess
import numpy as np
import pytest
from etils import epath
from flax import linen as nn

from configs import sd3_2b
from sd3_jax import lock, main, metrics, sharding
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.jobs import resume
from sd3_jax.jobs.train import Training

TINY = "--config=configs/sd3_2b.py:tiny"
QUIET = ["--config.train.eval_every=1000", "--config.train.sample_every=1000"]
BEFORE, AFTER = 3, 8


def tiny():
    return sd3_2b.get_config("tiny")


def changed(**values):
    config = tiny()
    for key, value in values.items():
        group, name = key.split("__")
        config[group][name] = value
    return config


def test_the_same_settings_go_on_in_silence(caplog):
    with caplog.at_level(logging.INFO):
        resume.compare("run", tiny().to_dict(), tiny())
    assert not caplog.text


@pytest.mark.parametrize(
    "values, was",
    [
        (dict(optim__lr=3e-4), "config.optim.lr was 0.0001, is 0.0003"),
        (dict(ema__decay=0.5), "config.ema.decay was 0.99, is 0.5"),
        (dict(model__depth=3), "config.model.depth was 2, is 3"),
        (dict(data__batch_size=16), "config.data.batch_size was 8, is 16"),
        (dict(optim__name="muon", flow__shift=2.0), 'config.optim.name was "adamw"'),
    ],
)
def test_other_settings_are_refused_unless_declared(values, was, caplog):
    keys = [key.replace("__", ".") for key in values]
    with pytest.raises(UserError) as error:
        resume.compare("runs/a", tiny().to_dict(), changed(**values))
    message = str(error.value)
    assert message.startswith("runs/a was trained with other settings")
    assert was in message and "\n" not in message
    assert all(f"config.{key} was" in message for key in keys)
    asked = message.partition("--config.train.changes=")[2].partition(";")[0]
    assert sorted(asked.split(",")) == sorted(keys)
    for declared in asked.split(","), [key.partition(".")[0] for key in keys]:
        config = changed(**values, train__changes=tuple(declared))
        with caplog.at_level(logging.INFO):
            resume.compare("runs/a", tiny().to_dict(), config)
        assert was in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    "values",
    [
        dict(train__steps=99, train__log_every=7, checkpoint__every=2),
        dict(mesh__data=2, data__threads=1, model__remat="full"),
        dict(sample__steps=3, eval__examples=8),
    ],
)
def test_how_a_run_is_done_may_change(values):
    resume.compare("run", tiny().to_dict(), changed(**values))


def test_a_key_of_another_version_is_no_change():
    saved = tiny().to_dict()
    del saved["optim"]["accumulate"]
    saved["optim"]["gone"] = 1
    resume.compare("run", saved, tiny())


def test_a_declared_key_must_be_one():
    config = changed(train__changes=("optim.lrr",))
    with pytest.raises(ConfigError, match='did you mean "optim.lr"'):
        resume.compare("run", tiny().to_dict(), config)


def test_readers_are_warned_of_another_model_of_the_same_weights(caplog):
    config = changed(model__pos_base=8, model__remat="full", sample__steps=3)
    resume.warn("runs/a", tiny().to_dict(), config)
    assert "config.model.pos_base was" in caplog.text and "remat" not in caplog.text
    caplog.clear()
    resume.warn("runs/a", tiny().to_dict(), tiny())
    assert not caplog.text


def test_cpus_by_accident_are_refused(monkeypatch):
    training = object.__new__(Training)
    leaf = jax.ShapeDtypeStruct((24, 4096, 4096), "float32")
    training.abstract = SimpleNamespace(params={"kernel": leaf})
    training.refuse_cpu_by_accident()  # JAX_PLATFORMS says that it is meant
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(
        UserError, match="0.4 billion parameters, and jax found nothing"
    ):
        training.refuse_cpu_by_accident()


def test_prompts_that_cannot_be_painted_are_told_at_the_start(tmp_path, capsys):
    flags = ["--config.train.prompts=a fox", "--config.train.sample_every=1"]
    assert main.main(["train", TINY, f"--workdir={tmp_path}", *flags]) == 2
    assert "wanted config.encode.weights" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_other_examples_are_refused_unless_declared():
    saved, given = {"name": "records", "records": 5}, {"name": "records", "records": 6}
    resume.compare_data("run", saved, dict(saved), tiny())
    resume.compare_data("run", None, given, tiny())  # of a version that did not say
    with pytest.raises(UserError, match="run was trained on other examples: .* 5.* 6"):
        resume.compare_data("run", saved, given, tiny())
    resume.compare_data("run", saved, given, changed(train__changes=("data",)))


# Runs


def train(workdir, devices, steps):
    config = changed(train__steps=steps, train__eval_every=99, train__sample_every=99)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        Training(config, epath.Path(workdir), mesh).run()
    return losses(workdir)


def losses(workdir):
    rows = metrics.read(workdir)
    return [row["loss"] for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of three steps on eight devices, and its losses to the eighth."""
    start = tmp_path_factory.mktemp("eight")
    train(start, 8, BEFORE)
    whole = shutil.copytree(start, tmp_path_factory.mktemp("whole") / "run")
    return start, train(whole, 8, AFTER)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_goes_on_on_fewer_devices(eight, tmp_path, devices):
    start, wanted = eight
    workdir = shutil.copytree(start, tmp_path / "run")
    found = train(workdir, devices, AFTER)
    assert found[:BEFORE] == wanted[:BEFORE]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_run_goes_on_in_two_processes(eight, tmp_path):
    start, wanted = eight
    workdir = shutil.copytree(start, tmp_path / "run")
    args = ["-m", "sd3_jax.main", "train", TINY, f"--workdir={workdir}", *QUIET]
    results = multiprocess.run([*args, f"--config.train.steps={AFTER}"], devices=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    assert "saved under other circumstances" in results[0].stderr
    np.testing.assert_allclose(losses(workdir), wanted, rtol=1e-5)


def test_two_runs_in_one_workdir_are_refused(tmp_path, capsys):
    args = ["train", TINY, f"--workdir={tmp_path}", *QUIET]
    with lock.held(tmp_path, "train"):
        assert main.main(args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sd3-jax: error: another job is at work in {tmp_path}")
