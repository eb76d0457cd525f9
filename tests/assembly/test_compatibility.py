"""Going on with a run: with other settings, other examples, on other devices."""

import logging
import re
import shutil
from pathlib import Path

import jax
import multiprocess
import numpy as np
import pytest
from etils import epath
from flax import linen as nn

from configs import dpo, dreambooth, finetune, lora, quality, sd3_2b
from sd3_jax import main
from sd3_jax.assembly import compatibility, examples
from sd3_jax.checkpoints import orbax_io, restoring
from sd3_jax.data.loader import Loader
from sd3_jax.distributed import lock, sharding
from sd3_jax.errors import ConfigError, UserError
from sd3_jax.monitoring import metrics
from sd3_jax.training import trainer
from sd3_jax.training.program import build_program
from sd3_jax.training.run_checks import (
    log_average,
    refuse_cpu_by_accident,
    warn_of_rate,
    warn_of_short_run,
)

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
        compatibility.compare("run", tiny().to_dict(), tiny())
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
        compatibility.compare("runs/a", tiny().to_dict(), changed(**values))
    message = str(error.value)
    assert message.startswith("runs/a was trained with other settings")
    assert was in message and "\n" not in message
    assert all(f"config.{key} was" in message for key in keys)
    asked = message.partition("--config.train.changes=")[2].partition(";")[0]
    assert sorted(asked.split(",")) == sorted(keys)
    for declared in asked.split(","), [key.partition(".")[0] for key in keys]:
        config = changed(**values, train__changes=tuple(declared))
        with caplog.at_level(logging.INFO):
            compatibility.compare("runs/a", tiny().to_dict(), config)
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
    compatibility.compare("run", tiny().to_dict(), changed(**values))


def test_the_docs_list_what_may_change():
    page = Path("docs/how-to/resume.md").read_text()
    _, _, section = page.partition("These may differ:")
    listed = re.findall("`([a-z_.]+)`", section.partition("Any other change")[0])
    assert sorted(listed) == sorted(compatibility.FREE_KEYS)


def decaying(steps, schedule="cosine", **values):
    about = dict(train__steps=steps, optim__schedule=schedule, optim__warmup=0)
    return changed(**about, **values)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1_200, 300])
def test_another_end_of_a_decay_is_refused_unless_declared(schedule, steps, caplog):
    saved = decaying(600, schedule).to_dict()
    with pytest.raises(UserError) as error:
        compatibility.compare_rate("runs/a", saved, decaying(steps, schedule), 200)
    message = str(error.value)
    old, new = (float(x) for x in re.findall(r"[0-9.]+e-0\d", message))
    assert (old < new) == (steps > 600) and "at step 200" in message
    assert "--config.train.changes=train.steps" in message and "\n" not in message
    for declared in "train.steps", "train":
        config = decaying(steps, schedule, train__changes=(declared,))
        compatibility.compare_rate("runs/a", saved, config, 200)
        assert f"was {old:.3g}, is {new:.3g}" in caplog.text
        caplog.clear()


def test_a_constant_rate_has_no_end(caplog):
    saved = decaying(600, "constant").to_dict()
    compatibility.compare_rate("runs/a", saved, decaying(1_200, "constant"), 200)
    assert not caplog.text
    compatibility.compare_rate(
        "a", saved, decaying(600, "constant", optim__lr=1.0), 200
    )
    assert "the learning rate at step 200 was 0.0001, is 1" in caplog.text


@pytest.mark.parametrize(
    "size, next_batch, wanted",
    [(8, None, 0), (16, None, 15 - 30), (4, None, 60 - 30), (7, None, 35 - 30),
     (8, 35, 5), (16, 35, 18 - 30)],
)  # fmt: skip
def test_examples_that_were_had_do_not_come_again(size, next_batch, wanted):
    """30 steps of 8 are 240 examples."""
    data = {"next_step": 30} | ({"next_batch": next_batch} if next_batch else {})
    config = changed(data__batch_size=size)
    ahead = compatibility.batches_ahead(data, tiny().to_dict(), config)
    assert ahead == wanted
    seen = (next_batch or 30) * 8
    source = examples.source(config)
    batches = Loader(
        source, batch_size=size, rows=np.arange(size), start=30, ahead=ahead
    )
    names = batches.names(30)
    assert 0 <= int(names[0].partition(":")[2]) - seen < size
    first = source.example(int(names[0].partition(":")[2]))["pooled"]
    np.testing.assert_array_equal(next(batches)["pooled"][0], first)


def test_a_rate_far_too_small_for_prodigy_is_told(caplog):
    warn_of_rate(changed(optim__name="prodigy", optim__lr=1.0))
    warn_of_rate(changed(optim__lr=1e-4))
    assert not caplog.text
    warn_of_rate(changed(optim__name="prodigy", optim__lr=1e-4))
    assert "config.optim.lr = 0.0001" in caplog.text and "1.0 is usual" in caplog.text


@pytest.mark.parametrize(
    "values, words",
    [
        (
            dict(train__sample_every=5_000, train__prompts=("a fox",)),
            "sample_every = 5000 is more than config.train.steps = 1000:"
            " config.train.prompts are never sampled; set --config.train.sample_every=",
        ),
        (dict(train__log_every=1_001), "metrics.jsonl gets no losses"),
        (
            dict(train__eval_every=1_001, data__held_out=("val-*",)),
            "the held-out records are never used",
        ),
        (
            dict(train__eval_every=1_001, data__name="digits"),
            "the loss is never validated; set --config.train.eval_every=100",
        ),
        (
            dict(optim__warmup=1_001),
            "config.optim.warmup = 1001 is more than config.train.steps = 1000",
        ),
    ],
)
def test_what_a_short_run_does_not_come_to_is_told(values, words, caplog):
    warn_of_short_run(changed(train__steps=1_000, **values))
    (message,) = caplog.messages
    assert words in message


@pytest.mark.parametrize("recipe", [sd3_2b, lora, dreambooth, finetune, dpo, quality])
def test_no_recipe_asks_for_what_it_does_not_come_to(recipe, caplog):
    config = recipe.get_config()
    config.train.prompts = ("a fox",)
    warn_of_short_run(config)
    assert not caplog.text


RECIPES = (sd3_2b, lora, dreambooth, finetune, dpo)


def test_a_run_too_short_for_its_average_is_told(caplog):
    caplog.set_level(logging.INFO)
    log_average(changed(train__steps=99, ema__every=100))
    assert "the average follows the weights closely" in caplog.text
    caplog.clear()
    log_average(changed(train__steps=100, ema__every=100))
    assert not caplog.text
    log_average(changed(optim__name="schedule_free"))
    assert "config.ema is not used" in caplog.text


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda x: x.__name__[8:])
def test_float16_does_not_train(recipe):
    config = recipe.get_config("tiny")
    config.model.dtype = "float16"
    with pytest.raises(UserError, match='"bfloat16" or "float32" to train'):
        build_program(config, None)


def test_a_key_of_another_version_is_no_change():
    saved = tiny().to_dict()
    del saved["optim"]["accumulate"]
    saved["optim"]["gone"] = 1
    compatibility.compare("run", saved, tiny())


def test_a_declared_key_must_be_one():
    config = changed(train__changes=("optim.lrr",))
    with pytest.raises(ConfigError, match='did you mean "optim.lr"'):
        compatibility.compare("run", tiny().to_dict(), config)


def test_readers_are_warned_of_another_model_of_the_same_weights(caplog):
    config = changed(model__pos_base=8, model__remat="full", sample__steps=3)
    compatibility.warn("runs/a", tiny().to_dict(), config)
    assert "config.model.pos_base was" in caplog.text and "remat" not in caplog.text
    caplog.clear()
    compatibility.warn("runs/a", tiny().to_dict(), tiny())
    assert not caplog.text


def test_cpus_by_accident_are_refused(monkeypatch):
    leaf = jax.ShapeDtypeStruct((24, 4096, 4096), "float32")
    refuse_cpu_by_accident({"kernel": leaf})  # JAX_PLATFORMS says that it is meant
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(UserError, match="0.4 billion parameters, but jax found only"):
        refuse_cpu_by_accident({"kernel": leaf})


def test_prompts_that_cannot_be_painted_are_told_at_the_start(tmp_path, capsys):
    flags = ["--config.train.prompts=a fox", "--config.train.sample_every=1"]
    assert main.main(["train", TINY, f"--workdir={tmp_path}", *flags]) == 2
    assert "set config.encode.weights" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


def test_other_examples_are_refused_unless_declared():
    saved, given = {"name": "records", "records": 5}, {"name": "records", "records": 6}
    compatibility.compare_data("run", saved, dict(saved), tiny())
    compatibility.compare_data(
        "run", None, given, tiny()
    )  # of a version that did not say
    with pytest.raises(UserError, match="run was trained on other examples: .* 5.* 6"):
        compatibility.compare_data("run", saved, given, tiny())
    compatibility.compare_data("run", saved, given, changed(train__changes=("data",)))


# Runs


def train(workdir, devices, steps, **values):
    quiet = dict(train__eval_every=99, train__sample_every=99)
    config = changed(train__steps=steps, **quiet, **values)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        trainer.train(config, epath.Path(workdir), mesh)
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


@pytest.mark.parametrize(
    "devices",  # the test of two processes has four devices
    [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))],
)
def test_a_run_goes_on_on_fewer_devices(eight, tmp_path, devices):
    start, wanted = eight
    workdir = shutil.copytree(start, tmp_path / "run")
    found = train(workdir, devices, AFTER)
    assert found[:BEFORE] == wanted[:BEFORE]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_copied_checkpoint_goes_on_as_the_run_that_it_is_of(eight, tmp_path):
    """To the last bit: weights, moments, average and the position in the data."""
    whole = shutil.copytree(eight[0], tmp_path / "whole")
    wanted = train(whole, 8, AFTER, checkpoint__every=5)
    fork = tmp_path / "fork"
    shutil.copytree(whole / "checkpoints" / "5", fork / "checkpoints" / "5")
    assert train(fork, 8, AFTER) == wanted[5:]
    path = lambda workdir: epath.Path(workdir) / "checkpoints" / str(AFTER)
    prints = [restoring.read_about(path(x))["fingerprints"] for x in (whole, fork)]
    assert prints[0] == prints[1]


def test_train_refuses_the_step_that_other_jobs_read(eight, capsys):
    argv = ["train", TINY, f"--workdir={eight[0]}", "--config.sample.step=2"]
    assert main.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"copy {eight[0]}/checkpoints/2 to NEW/checkpoints/2" in line
    assert f"--config.tune.base={eight[0]}/checkpoints/2" in line


def test_an_earlier_step_is_a_base(eight, tmp_path, caplog, capsys):
    """Its average is what the run starts from; its number is not."""
    caplog.set_level(logging.INFO)
    run = shutil.copytree(eight[0], tmp_path / "run")
    train(run, 8, 5)
    flags = [*QUIET, "--config.train.steps=1", "--config.optim.lr=1e-12"]
    for base, step in (run, 5), (run / "checkpoints" / "3", 3):
        caplog.clear()
        argv = ["train", TINY, f"--workdir={tmp_path}/{step}", *flags]
        assert main.main([*argv, f"--config.tune.base={base}"]) == 0
        assert f"starting from step {step} of {base}" in caplog.text
    absent = f"--config.tune.base={run}/checkpoints/4"
    assert main.main(["train", TINY, f"--workdir={tmp_path}/4", *flags, absent]) == 2
    assert "not a complete checkpoint; complete steps: 3, 5" in capsys.readouterr().err


def test_a_run_goes_on_with_another_batch_size(eight, tmp_path, caplog):
    workdir, sizes = (
        shutil.copytree(eight[0], tmp_path / "run"),
        {"data__batch_size": 16},
    )
    train(workdir, 1, 4, train__changes=("data.batch_size",), **sizes)
    assert "24 examples were trained on, the next is 32" in caplog.text
    path = epath.Path(workdir) / "checkpoints" / "4"
    assert orbax_io.load(path, {"data": None})["data"]["next_batch"] == 3
    caplog.clear()
    train(workdir, 1, 4, **sizes)  # nothing is left to do, nor to declare
    assert "examples were trained on" not in caplog.text


def test_a_run_goes_on_in_two_processes(eight, tmp_path):
    start, wanted = eight
    workdir = shutil.copytree(start, tmp_path / "run")
    args = ["-m", "sd3_jax.main", "train", TINY, f"--workdir={workdir}", *QUIET]
    results = multiprocess.run([*args, f"--config.train.steps={AFTER}"], devices=2)
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    assert "saved in another environment" in results[0].stderr
    np.testing.assert_allclose(losses(workdir), wanted, rtol=1e-5)


def test_two_runs_in_one_workdir_are_refused(tmp_path, capsys):
    args = ["train", TINY, f"--workdir={tmp_path}", *QUIET]
    with lock.held(tmp_path, "train"):
        assert main.main(args) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"sd3-jax: error: another job is running in {tmp_path}")
