"""Jobs whose weights are in eight bits: of a run of ours, and where T5 encodes."""

import json

import jax
import numpy as np
import pytest
from parity import miniature

from sd3_jax import main
from sd3_jax.assembly import examples, model_parts
from sd3_jax.distributed import sharding
from sd3_jax.params import lora, parametrization, quantization
from sd3_jax.params.quantization import Int8

RECIPE = "--config=configs/quickstart.py:tiny"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--config.train.steps=2", "--config.train.sample_every=100"]
    assert main.main(["train", RECIPE, f"--workdir={folder}", *flags]) == 0
    return folder


def params_of(workdir, *flags, **options):
    config = main.parse(["sample", RECIPE, f"--workdir={workdir}", *flags]).config
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    made = model_parts.build_parts(config)
    return model_parts.trained_params(config, made, workdir, mesh, **options)[0]


def test_a_runs_blocks_are_rounded_as_it_is_read(workdir):
    flag = "--config.quantize.denoiser=int8"
    plain, made = params_of(workdir), params_of(workdir, flag)
    wanted, found = lora.kernels(plain["denoiser"]), lora.kernels(made["denoiser"])
    for path in quantization.quantizable_paths(plain["denoiser"]):
        assert isinstance(found[path], Int8)
        assert found[path].q.sharding.is_equivalent_to(
            wanted[path].sharding, wanted[path].ndim
        )
        top = np.abs(wanted[path]).max()
        np.testing.assert_allclose(found[path].array(), wanted[path], atol=top / 250)
    assert not any(
        map(
            parametrization.is_leaf,
            jax.tree.leaves(made["text"], is_leaf=parametrization.is_leaf),
        )
    )
    exact = params_of(workdir, flag, exact=True)  # what convert writes
    jax.tree.map(np.testing.assert_array_equal, exact, plain)


def test_sample_and_evaluate_use_them_and_say_so(workdir):
    flags = [RECIPE, f"--workdir={workdir}", "--config.sample.prompt=a red two"]
    lines = {}
    for kind in "", "int8", "int8_dynamic":
        assert main.main(["sample", *flags, f"--config.quantize.denoiser={kind}"]) == 0
        lines[kind] = json.loads((workdir / "samples.jsonl").read_text())
    assert len({line["weights"] for line in lines.values()}) == 3
    assert "quantize" not in lines[""]
    assert lines["int8_dynamic"]["quantize"] == {"denoiser": "int8_dynamic"}
    losses = {}
    for kind in "", "int8", "int8_dynamic":
        own = ["--config.eval.scores=val_loss", f"--config.quantize.denoiser={kind}"]
        assert main.main(["evaluate", *flags, *own]) == 0
        found = json.loads((workdir / "scores.json").read_text())
        assert found["quantize"] == ({"denoiser": kind} if kind else {})
        losses[kind] = next(iter(found["val_loss"].values()))
    for kind in "int8", "int8_dynamic":
        assert abs(losses[kind] - losses[""]) < 0.01 * losses[""]


def test_t5_where_records_are_encoded():
    flags = [
        f"--config.encode.weights={miniature.folder('sd35_large')}",
        *("--config.model.context_dim=160", "--config.model.pooled_dim=128"),
        *("--config.text.length=100", "--config.quantize.t5=int8"),
    ]
    recipe = "--config=configs/sd3_2b.py:tiny"
    config = main.parse(["precompute", recipe, "--workdir=unused", *flags]).config
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = examples.encoder(config, mesh, ["clip_l", "clip_g", "t5"])
    assert made.bundle.quantize == {"t5": "int8"}
    blocks = made.bundle.variables["t5"]["params"]["stack"]["blocks"]
    assert isinstance(blocks["wi"]["kernel"], Int8)
    assert "vae" in examples.encoder(config, mesh, ["vae"]).bundle.modules


def test_whole_numbers_are_too_large_for_float16(tmp_path, capsys):
    flags = ["--config.quantize.denoiser=int8", "--config.model.dtype=float16"]
    assert main.main(["sample", RECIPE, f"--workdir={tmp_path}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert 'quantize.denoiser = "int8": expected "", or config.model.dtype' in error
