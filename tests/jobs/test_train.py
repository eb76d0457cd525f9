"""Training end to end on the tiny recipe: meshes, processes, kills, samples, scores."""

import json
import re
import time

import jax
import multiprocess
import numpy as np
import pytest
from etils import epath
from flax import linen as nn
from orbax.checkpoint import v1 as ocp
from PIL import Image

from configs import quickstart
from sd3_jax import main
from sd3_jax.distributed import processes, sharding
from sd3_jax.errors import UserError
from sd3_jax.monitoring import metrics
from sd3_jax.monitoring.goodput import KINDS
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.training.nonfinite import NonFinite
from sd3_jax.training.program import abstract_batch, build_program
from sd3_jax.training.run_progress import RunProgress
from sd3_jax.training.trainer import train as run_training

TINY = "--config=configs/quickstart.py:tiny"


def losses(workdir):
    rows = metrics.read(workdir)
    return [row["loss"] for row in rows if row["kind"] == "train"]


def goodput(workdir):
    """The last line, whose shares are all of the time."""
    rows = metrics.read(workdir)
    *_, line = (row for row in rows if row["kind"] == "goodput")
    assert abs(sum(line[kind] for kind in KINDS) - 1) < 1e-6
    seconds = sum(line[f"{kind}_s"] for kind in KINDS)
    return line | {"seconds": seconds, "first": rows[0]["time"]}


def five_steps(workdir, devices, **axes):
    workdir = epath.Path(workdir)
    config = quickstart.get_config("tiny")
    config.train.update(steps=5, eval_every=100, sample_every=100, prompts=())
    config.mesh.update(axes)
    mesh = sharding.make_mesh(**config.mesh, devices=jax.devices()[:devices])
    workdir.mkdir(exist_ok=True)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        run_training(config, workdir, mesh)
    return losses(workdir)


@pytest.fixture(scope="session")
def one_device(tmp_path_factory):
    return five_steps(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(dict(data=8, fsdp=1), marks=pytest.mark.slow),
        dict(fsdp=8),
        # The test of two processes has this mesh too.
        pytest.param(dict(data=2, fsdp=4), marks=pytest.mark.slow),
        pytest.param(dict(fsdp=4, tensor=2), marks=pytest.mark.slow),
        dict(data=2, fsdp=1, context=2, tensor=2),
    ],
    ids=lambda axes: "-".join(f"{k}{v}" for k, v in axes.items()),
)
def test_losses_do_not_depend_on_the_mesh(tmp_path, one_device, axes):
    np.testing.assert_allclose(five_steps(tmp_path, 8, **axes), one_device, rtol=1e-5)


def test_two_processes_train_as_one(tmp_path, one_device):
    results = multiprocess.run(
        [
            "-m", "sd3_jax.main", "train", TINY, f"--workdir={tmp_path}",
            "--config.train.steps=5", "--config.train.eval_every=100",
            "--config.train.sample_every=100", "--config.mesh.data=2",
            "--config.profile.start=4",
        ],
        processes=2,
        devices=4,
        timeout=400,
    )  # fmt: skip
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:]
    np.testing.assert_allclose(losses(tmp_path), one_device, rtol=1e-5)
    traces = (tmp_path / "profile/plugins/profile/step_00000004").glob("*.xplane.pb")
    assert sorted(path.name[:2] for path in traces) == ["0.", "1."]
    assert [r.stdout.count("goodput") for r in results] == [1, 0]


def test_process_0_says_where_sigterm_stopped_all(tmp_path):
    flags = ["--config.train.steps=2000", "--config.train.eval_every=9999"]
    flags += ["--config.train.sample_every=9999", "--config.checkpoint.every=999"]
    job = ["-m", "sd3_jax.main", "train", TINY, f"--workdir={tmp_path}", *flags]
    with multiprocess.start(job, devices=1) as cluster:
        deadline = time.monotonic() + 200
        while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        cluster[1].terminate()
        codes = [process.wait(120) for process in cluster]
        said, silent = (multiprocess.result(x).stderr for x in cluster)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    step = folder.name
    assert codes == [0, 0], said[-2000:]
    assert f"sd3-jax: SIGTERM: saving step {step}, then all processes stop" in said
    where = f"at step {step} of 2000; run the same command to resume from step {step}"
    assert f"sd3-jax: SIGTERM: stopped {where}" in said
    assert "sd3-jax: SIGTERM" not in silent


def test_max_hours_stops_a_run_with_a_checkpoint(tmp_path, capfd):
    argv = ["train", TINY, f"--workdir={tmp_path}", "--config.train.steps=5"]
    argv += ["--config.train.eval_every=100", "--config.train.sample_every=100"]
    assert main.main([*argv, "--config.train.max_hours=1e-9"]) == 0
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert folder.name == "1"
    said = "sd3-jax: config.train.max_hours = 1e-09 reached: stopped at step 1 of 5; "
    assert said + "run the same command to resume from step 1" in capfd.readouterr().err


def test_process_0_asks_once_to_stop_in_time(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "ask_to_stop", lambda: asked.append(1))
    progress = RunProgress(9, NonFinite(0), max_hours=2.0)
    for hours in (0.5, 1.9, 2.1, 2.2):
        progress.stop_in_time(3600 * hours)
        assert len(asked) == (hours > 2)
    RunProgress(9, NonFinite(0)).stop_in_time(1e9)  # no limit
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    RunProgress(9, NonFinite(0), max_hours=2.0).stop_in_time(1e9)
    assert len(asked) == 1


def train(workdir, **env):
    args = ["tests/chaos_worker.py", "train", TINY, f"--workdir={workdir}"]
    flags = ["--config.train.steps=20", "--config.train.eval_every=100"]
    return multiprocess.run(args + flags, processes=1, devices=1, env=env, timeout=300)[
        0
    ]


def test_a_killed_run_ends_as_the_unbroken_one(tmp_path):
    """Parameters, average, optimizer state and every loss: equal to the last bit."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole).returncode == 0
    assert train(killed, KILL_AT="13").returncode == -9
    assert not (killed / "checkpoints" / "20").exists()
    resumed = train(killed)
    assert resumed.returncode == 0 and "resuming from step" in resumed.stderr
    assert losses(killed) == losses(whole)
    unbroken, broken = goodput(whole), goodput(killed)
    assert unbroken["lost"] == 0 < broken["lost"] and broken["restarts"] == 1
    assert all(line["productive"] > 0 < line["compile"] for line in (unbroken, broken))
    lived = broken["time"] - broken["first"]  # and the first life's start-up
    assert lived < broken["seconds"] < lived + broken["start_up_s"]
    assert resumed.stdout.startswith("goodput ") and "lost 0.0 %" not in resumed.stdout
    states = [
        ocp.load_checkpointables(str(w / "checkpoints" / "20"), {"state": None})[
            "state"
        ]
        for w in (whole, killed)
    ]
    leaves = [jax.tree_util.tree_leaves_with_path(state) for state in states]
    assert len(leaves[0]) == len(leaves[1]) > 100
    for (path, a), (_, b) in zip(*leaves):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    flags = ["--config.train.steps=4", "--config.train.eval_every=2"]
    flags += ["--config.train.sample_every=2", "--config.profile.start=3"]
    assert main.main(["train", TINY, f"--workdir={workdir}", *flags]) == 0
    return workdir


def test_training_leaves_what_the_report_reads(trained):
    assert json.loads((trained / "run.json").read_text())["parameters"] > 10_000
    assert json.loads((trained / "config.json").read_text())["model"]["depth"] == 2
    rows = metrics.read(trained)
    val = [row for row in rows if row["kind"] == "val"]
    assert [row["step"] for row in val] == [2, 4] and "loss_t0.0625" in val[0]
    sheets = [row["path"] for row in rows if row["kind"] == "samples"]
    assert sheets and all((trained / path).is_file() for path in sheets)
    line = goodput(trained)
    assert line["step"] == 4 and line["finished"] and line["evaluation"] > 0
    assert main.main(["report", TINY, f"--workdir={trained}"]) == 0
    assert (trained / "report.html").stat().st_size > 10_000
    assert "start-up" in (trained / "report.html").read_text()


def test_training_leaves_a_trace_of_steps_with_names(trained):
    (path,) = (trained / "profile").glob("plugins/profile/step_00000003/*.xplane.pb")
    trace = path.read_bytes()
    assert all(name in trace for name in (b"train", b"step_num", b"last_block"))


def test_a_finished_run_has_nothing_to_do(trained):
    flags = ["--config.train.steps=4"]
    before = (trained / "metrics.jsonl").read_bytes()
    assert main.main(["train", TINY, f"--workdir={trained}", *flags]) == 0
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_sample_paints_a_prompt_and_a_file_of_prompts(trained, tmp_path, capsys):
    sample = ["sample", TINY, f"--workdir={trained}"]
    assert main.main([*sample, "--config.sample.prompt=a blue four"]) == 0
    alone = Image.open(trained / "samples" / "0000-a-blue-four.png")
    assert alone.text["prompt"] == "a blue four"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red one\n\n  a blue four \na green ../../x\n")
    assert main.main([*sample, f"--config.sample.prompts_file={prompts}"]) == 0
    lines = (trained / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in rows] == [
        "a red one",
        "a blue four",
        "a green ../../x",
    ]
    assert all((trained / row["file"]).parent == trained / "samples" for row in rows)
    company = Image.open(trained / rows[1]["file"])
    np.testing.assert_array_equal(np.asarray(company), np.asarray(alone))
    assert (trained / "samples.png").is_file()


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.sample.prompts_file=no/such.txt", "no such file"),
        ("--config.eval.scores=('dogits',)", 'did you mean "digits"'),
    ],
)
def test_mistakes_are_one_line(trained, capsys, flag, words):
    job = "sample" if "sample" in flag else "evaluate"
    assert main.main([job, TINY, f"--workdir={trained}", flag]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error


def test_sampling_before_training_says_so(tmp_path, capsys):
    code = main.main(
        ["sample", TINY, f"--workdir={tmp_path}", "--config.sample.prompt=a"]
    )
    assert code == 2 and str(tmp_path) in capsys.readouterr().err


def test_evaluate_scores_every_kind(trained, capsys):
    flags = ["--config.eval.pictures=6", "--config.sample.steps=2"]
    assert main.main(["evaluate", TINY, f"--workdir={trained}", *flags]) == 0
    scores = json.loads((trained / "scores.json").read_text())
    names = [row["name"] for row in scores["scores"]]
    assert "single digits" in names and "scorer on real scans" in names
    assert "single digits" in capsys.readouterr().out
    assert {row["prompt"] for row in scores["prompts"]} and "loss" in scores["val_loss"]


def test_a_mesh_that_does_not_fit_is_explained():
    with pytest.raises(UserError, match="needs 6 devices but there are 8"):
        sharding.make_mesh(data=3, fsdp=2)
    with pytest.raises(UserError, match="3 does not divide the 8"):
        sharding.make_mesh(data=3)
    mesh = sharding.make_mesh(data=2)
    with pytest.raises(UserError, match="must be a multiple of data x fsdp = 8"):
        sharding.local_rows(mesh, 12)


def test_a_large_weight_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh(fsdp=8)
    boxed = lambda shape: {
        "w": nn.LogicallyPartitioned(
            jax.ShapeDtypeStruct(shape, float), ("embed", None)
        )
    }
    with pytest.raises(UserError, match="2436 by fsdp=8"):
        sharding.shardings(boxed((2436, 4096)), mesh)
    assert not any(sharding.shardings(boxed((12, 4)), mesh)["w"].spec)


def test_state_is_sharded_from_birth():
    config = quickstart.get_config("tiny")
    mesh = sharding.make_mesh(fsdp=8)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        abstract = build_program(config, mesh).abstract
    moments = jax.tree_util.tree_leaves_with_path(abstract.opt_state)
    params = jax.tree_util.tree_leaves_with_path(abstract.params)
    specs = {str(path[-6:]): x.sharding.spec for path, x in params}
    assert sum("fsdp" in str(spec) for spec in specs.values()) > len(specs) / 2
    tailed = [x.sharding.spec for path, x in moments if x.ndim]
    assert len(tailed) == 2 * len(params)
    assert sorted(map(str, tailed)) == sorted(
        2 * [str(x.sharding.spec) for _, x in params]
    )


def scopes(lowered) -> str:
    return "\n".join(re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True)))


def test_a_profile_will_name_every_part_of_the_programs():
    config = quickstart.get_config("tiny")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        program = build_program(config, mesh)
        batch = abstract_batch(config, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        step = scopes(program.step.lower(program.abstract, key, batch, {}))
        batch = batch | {"number": jax.ShapeDtypeStruct((8,), np.uint32)}
        painter = TrainedSampler(config, program.parts, mesh)
        arguments = program.abstract.ema, batch, {}, painter.times
        painted = scopes(painter.program.lower(*arguments))
    forward, backward = "jit(step)/jvp(loss)/", "jit(step)/transpose(jvp(loss))/"
    for name in (
        *(f"{way}MMDiT/MMDiT.velocity/{part}/" for way in (forward, backward)
          for part in ("while/body", "last_block/image.open/attn.qkv/to_qkv")),
        # What is scanned is a function, named from its own beginning.
        "blocks.body/blocks/image.open/attn.qkv/to_qkv/",
        "blocks.body/blocks/text.close/mlp/fc1/",
        f"{forward}square", "jit(step)/jvp(text)/ByteTower/",
        "/optimizer/", "/ema/", "jit(step)/grad_norm/",  # the first two in a branch
    ):  # fmt: skip
        assert name in step, name
    for name in "solver/", "solver/MMDiT/MMDiT.velocity/last_block/", "guidance/":
        assert name in painted, name
