"""Fine-tuning end to end: from released weights and from a run of ours."""

import json

import jax
import multiprocess
import numpy as np
import pytest
from flax import linen as nn
from parity import miniature

from sd3_jax import main
from sd3_jax.assembly import finetune_start, model_parts
from sd3_jax.data import shards
from sd3_jax.data.records import Record
from sd3_jax.distributed import sharding
from sd3_jax.monitoring import metrics
from sd3_jax.params.lora import modules
from sd3_jax.sampling import bundle_loading
from sd3_jax.weights import adapter_files, peft_config, safetensors

MEDIUM = {  # what the miniature is
    **{"depth": 4, "width": 64, "num_heads": 1, "dual_blocks": 2, "pos_size": 24},
    **{"context_dim": 160, "pooled_dim": 128, "dtype": "float32"},
}
SAVED: list[int] = []  # steps at which the run below wrote its LoRA
SHORT = {"train.steps": 4, "checkpoint.every": 2, "train.eval_every": 100}


def train(workdir, recipe, **flags) -> int:
    given = [f"--config.{name}={value}" for name, value in (SHORT | flags).items()]
    return main.main(["train", f"--config={recipe}", f"--workdir={workdir}", *given])


@pytest.fixture(scope="module")
def released():
    model = {f"model.{name}": value for name, value in MEDIUM.items()}
    return model | {"tune.base": miniature.folder("sd35_medium"), "data.batch_size": 8}


@pytest.fixture(scope="module")
def tuned(released, tmp_path_factory):
    """A LoRA beside the released miniature, trained unbroken."""
    workdir = tmp_path_factory.mktemp("lora")
    save = finetune_start.save_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            finetune_start,
            "save_adapter",
            lambda *args: SAVED.append(args[-1]) or save(*args),
        )
        assert train(workdir, "configs/lora.py:tiny", **released) == 0
    return workdir


def test_the_adapter_is_written_at_every_checkpoint(tuned):
    assert SAVED == [2, 4]
    _, metadata = safetensors.open_file(tuned / adapter_files.FILE)
    assert metadata["step"] == "4"


def test_a_run_starts_from_a_lora_file(tuned, released, tmp_path):
    flags = released | {"tune.lora": tuned, "train.steps": 1, "optim.lr": 1e-12}
    assert train(tmp_path, "configs/lora.py:tiny", **flags) == 0
    new, _ = safetensors.open_file(tmp_path / adapter_files.FILE)
    for key, tensor in safetensors.open_file(tuned / adapter_files.FILE)[0].items():
        np.testing.assert_allclose(new[key].read(), tensor.read(), rtol=1e-5, atol=1e-9)
    assert losses(tmp_path)[0] != losses(tuned)[0]


def renamed(tuned, folder, kind):
    """The run's LoRA as kohya's scripts and PEFT write one, of another alpha."""
    tensors, _ = safetensors.open_file(tuned / adapter_files.FILE)
    arrays = {key.removeprefix("transformer."): x.read() for key, x in tensors.items()}
    if kind == "peft":
        made = {f"base_model.model.{key}": x for key, x in arrays.items()}
        about = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
        (folder / peft_config.CONFIG).write_text(json.dumps(about))
        path = folder / adapter_files.PEFT_FILE
    else:
        made, path = {}, folder / "kohya.safetensors"
        for key, x in arrays.items():
            module, side = key.removesuffix(".weight").rsplit(".", 1)
            name = f"lora_transformer_{module.replace('.', '_')}"
            down = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
            made[f"{name}.{down}.weight"] = x
            made[f"{name}.alpha"] = np.float32([32.0]).reshape(())
    entry = lambda x: safetensors.Entry(x.dtype, x.shape, lambda: x)
    safetensors.write_file(path, {key: entry(x) for key, x in made.items()})
    return folder if kind == "peft" else path


@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_a_run_starts_from_other_tools_files(kind, tuned, released, tmp_path):
    def loaded(path, *more):
        flags = [
            f"--config.{k}={v}" for k, v in (released | {"tune.lora": path}).items()
        ]
        argv = ["train", "--config=configs/lora.py:tiny", "--workdir=unused", *flags]
        config = main.parse([*argv, *more]).config
        adapter = finetune_start.initial_adapter(
            config, model_parts.build_parts(config)
        )
        return dict(modules(adapter["denoiser"], "a"))

    wanted, path = loaded(tuned), renamed(tuned, tmp_path, kind)
    for alpha, scale in (
        (0, 2.0),
        (8, 4.0),
    ):  # of tune.alpha, that b is times in training
        found = loaded(path, f"--config.tune.alpha={alpha}")
        assert found.keys() == wanted.keys() and wanted
        for place, pair in wanted.items():
            np.testing.assert_allclose(found[place]["a"], pair["a"], rtol=1e-6)
            np.testing.assert_allclose(found[place]["b"], scale * pair["b"], rtol=1e-6)


def test_a_checkpoint_by_its_step(tuned, released, capsys):
    argv = ["--config=configs/lora.py:tiny", f"--workdir={tuned}"]
    argv += [f"--config.{k}={v}" for k, v in released.items()]
    config = main.parse(["convert", *argv, "--config.sample.step=2"]).config
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = model_parts.build_parts(config)
        assert model_parts.trained_params(config, parts, tuned, mesh)[1] == 2
    for job in "evaluate", "convert":
        assert main.main([job, *argv, "--config.sample.step=3"]) == 2
        assert "complete steps: 2, 4" in capsys.readouterr().err


def losses(workdir):
    return [row["loss"] for row in metrics.read(workdir) if row["kind"] == "train"]


def test_a_lora_goes_on_as_if_unbroken_and_only_it_is_saved(tuned, released, tmp_path):
    assert (
        train(tmp_path, "configs/lora.py:tiny", **released, **{"train.steps": 2}) == 0
    )
    assert train(tmp_path, "configs/lora.py:tiny", **released) == 0
    assert losses(tmp_path) == losses(tuned)
    size = lambda path: sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
    base = released["tune.base"]
    assert size(tuned / "checkpoints" / "4") < size(base / "transformer")


def test_the_adapter_it_leaves_is_what_it_trained(tuned, released):
    flags = [f"--config.{k}={v}" for k, v in released.items()]
    argv = ["sample", "--config=configs/lora.py:tiny", f"--workdir={tuned}", *flags]
    config = main.parse(argv).config
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = model_parts.build_parts(config)
        params, step = model_parts.trained_params(config, parts, tuned, mesh)
        assert step == 4
        x = jax.random.normal(jax.random.key(0), (8, 8, 8, 16))
        cond = (
            jax.random.normal(jax.random.key(1), (8, 24, 160)),
            x[:, :, 0].reshape(8, 128),
        )
        ours = parts.objective.velocity(params)
        ours = jax.jit(lambda x: ours(x, 0.5 + 0 * x[:, 0, 0, 0], cond))(x)
    bundle = bundle_loading.load(
        str(released["tune.base"]),
        mesh=mesh,
        dtype="float32",
        only=("denoiser",),
        lora=[str(tuned)],
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        variables = bundle.merge_adapters().variables["denoiser"]
        module = bundle.part("denoiser")
        theirs = jax.jit(
            lambda x: module.apply(variables, x, 0.5 + 0 * x[:, 0, 0, 0], *cond)
        )(x)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.std(theirs))


def test_a_run_killed_at_its_end_leaves_the_adapter_when_started_again(tuned, released):
    path = tuned / "pytorch_lora_weights.safetensors"
    before = path.read_bytes()
    path.unlink()
    assert train(tuned, "configs/lora.py:tiny", **released) == 0
    assert path.read_bytes() == before


def test_plan_knows_no_fine_tuning(tmp_path, capsys):
    for more in ["--config.tune.base=x"], []:
        argv = ["plan", "--config=configs/lora.py:tiny", f"--workdir={tmp_path}", *more]
        assert main.main(argv) == 2
        assert "plan supports only training from scratch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"model.depth": 3}, "config.model.depth = 3; set --config.model.depth=4"),
        (
            {"tune.base": ""},
            'config.tune.method = "lora" needs weights to start from: set config',
        ),
        ({"tune.base": "nowhere/at/all"}, "config.tune.base: "),
        ({"tune.targets": "atn"}, 'did you mean "attn"'),
        ({"tune.lora": "nowhere/at/all.safetensors"}, "config.tune.lora = nowhere"),
    ],
)
def test_a_base_that_does_not_fit_is_told_of(flags, words, released, tmp_path, capsys):
    assert train(tmp_path, "configs/lora.py:tiny", **released | flags) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            {"tune.rank": 8},
            "rank is 16 but config.tune.rank = 8; expected --config.tune.rank=16",
        ),
        ({"tune.targets": "mlp"}, 'which config.tune.targets = "mlp" does not'),
    ],
)
def test_a_lora_file_that_does_not_fit_is_told_of(
    flags, words, tuned, released, tmp_path, capsys
):
    flags = released | {"tune.lora": tuned} | flags
    assert train(tmp_path, "configs/lora.py:tiny", **flags) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_run_goes_on_beside_its_own_base_alone(tuned, released, capsys):
    other = released | {"tune.base": miniature.folder("sd35_medium"), "seed": 0}
    first = next((tuned / "checkpoints").glob("4"))
    assert first.exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd3_jax.tree.fingerprint", lambda tree: "another")
        code = train(tuned, "configs/lora.py:tiny", **other, **{"train.steps": 6})
    assert code == 2
    assert "began with other weights" in capsys.readouterr().err


def test_full_weights_start_as_the_released_and_are_converted_back(released, tmp_path):
    run = tmp_path / "run"
    flags = released | {"train.steps": 1, "optim.lr": 1e-9}
    assert train(run, "configs/finetune.py:tiny", **flags) == 0
    given = [f"--config.{k}={v}" for k, v in flags.items()]
    argv = ["--config=configs/finetune.py:tiny", f"--workdir={run}", *given]
    assert main.main(["convert", *argv]) == 0
    mesh = sharding.make_mesh()
    load = lambda path: bundle_loading.load(str(path), mesh=mesh, dtype="float32")
    old, new = load(released["tune.base"]), load(run / "diffusers")
    assert new.modules.keys() == old.modules.keys()
    leaves = zip(*(jax.tree.leaves(x.variables["denoiser"]) for x in (old, new)))
    for a, b in leaves:
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_dpo_begins_at_ln_2_from_a_run_of_ours(tmp_path):
    base, pairs = tmp_path / "base", tmp_path / "pairs.arecord"
    assert train(base, "configs/quickstart.py:tiny") == 0
    image = np.random.default_rng(0).integers(0, 256, (16, 2, 8, 8, 3), np.uint8)
    with shards.Writer(pairs) as shard:
        for i, (a, b) in enumerate(image):
            shard.write(Record({"image": a, "rejected_image": b}, f"{i}", "a red two"))
    flags = {"tune.base": base, "tune.method": "lora", "tune.objective": "dpo"}
    flags |= {"data.name": "records", "data.records": pairs, "tune.targets": ""}
    flags |= {"optim.warmup": 0, "optim.lr": 1e-2, "train.steps": 2}
    given = [f"--config.{name}={value}" for name, value in (SHORT | flags).items()]
    job = ["-m", "sd3_jax.main", "train", "--config=configs/quickstart.py:tiny"]
    job += [f"--workdir={tmp_path}/dpo", *given]
    # In a process with XLA's usual fusions, where both networks round alike.
    usual = "--xla_force_host_platform_device_count=8 "
    env = {"XLA_FLAGS": usual + "--xla_backend_optimization_level=0"}
    (done,) = multiprocess.run(job, processes=1, devices=8, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [x for x in metrics.read(tmp_path / "dpo") if x["kind"] == "train"]
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[0]["margin"] == 0 and rows[1]["margin"] != 0


def test_dreambooth_tells_its_two_losses_apart(released, tmp_path):
    flags = released | {"train.steps": 2, "optim.accumulate": 2}
    assert train(tmp_path, "configs/dreambooth.py:tiny", **flags) == 0
    rows = [x for x in metrics.read(tmp_path) if x["kind"] == "train"]
    for row in rows:
        assert row["loss"] == pytest.approx(row["instance"] + row["prior"], rel=1e-6)


def test_convert_writes_a_runs_lora_alone(tuned, released, tmp_path):
    flags = released | {"convert.lora_format": "diffusers", "convert.out": tmp_path}
    argv = [f"--config.{name}={value}" for name, value in flags.items()]
    command = ["convert", "--config=configs/lora.py:tiny", f"--workdir={tuned}"]
    assert main.main([*command, *argv]) == 0
    again, _ = safetensors.open_file(tmp_path / adapter_files.FILE)
    run, _ = safetensors.open_file(tuned / adapter_files.FILE)
    assert again.keys() == run.keys()
    for key, tensor in run.items():
        np.testing.assert_allclose(again[key].read(), tensor.read(), rtol=1e-6)
