"""convert: between layouts, and from a training checkpoint to what PyTorch reads."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from parity import convert, miniature

import sd3_jax
from configs import quickstart
from sd3_jax import main
from sd3_jax.assembly import model_parts
from sd3_jax.distributed import sharding

TINY = "--config=configs/released.py:tiny"


def run(workdir, *flags, recipe=TINY):
    return main.main(["convert", recipe, f"--workdir={workdir}", *flags])


def test_from_layout_to_layout_and_back(tmp_path):
    source = miniature.folder("sd35_large")
    step = lambda name, source, to: run(
        tmp_path,
        f"--config.weights={source}",
        f"--config.convert.to={to}",
        f"--config.convert.out={tmp_path / name}",
        f"--config.tokenizers={miniature.folder('sd35_large')}",
    )
    assert step("a.safetensors", source, "original") == 0
    assert step("b", tmp_path / "a.safetensors", "orbax") == 0
    assert step("c", tmp_path / "b", "diffusers") == 0
    for file in source.glob("*/*.safetensors"):
        theirs = safetensors.torch.load_file(file)
        ours = safetensors.torch.load_file(tmp_path / "c" / file.relative_to(source))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs), file
    diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "c")


def test_a_dtype_of_ones_own(tmp_path):
    flags = [f"--config.weights={miniature.folder('sd3_medium')}"]
    flags += ["--config.convert.to=original", "--config.convert.dtype=float16"]
    assert run(tmp_path, *flags) == 0
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in found.values()} == {torch.float16}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    flags = ["--config.train.steps=2", "--config.train.sample_every=100"]
    recipe = "--config=configs/quickstart.py:tiny"
    assert main.main(["train", recipe, f"--workdir={workdir}", *flags]) == 0
    return workdir, recipe


def test_what_we_trained_runs_in_pytorch(trained):
    """The positions, a formula here, must be the table that diffusers is given."""
    workdir, recipe = trained
    assert run(workdir, recipe=recipe) == 0
    folder = workdir / "diffusers" / "transformer"
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(folder).eval()
    config = quickstart.get_config("tiny")
    made = model_parts.build_parts(config)
    mesh = sharding.make_mesh()
    params, _ = model_parts.trained_params(config, made, workdir, mesh)
    draw = np.random.default_rng(0).standard_normal
    h, w, c = made.shape
    shapes = (
        (2, h, w, c),
        (2, 5, config.model.context_dim),
        (2, config.model.pooled_dim),
    )
    xt, context, pooled = (draw(shape).astype(np.float32) for shape in shapes)
    t = np.array([0.3, 0.9], np.float32)
    args = map(jnp.asarray, (xt, t, context, pooled))
    ours = made.denoiser.apply({"params": params["denoiser"]}, *args)
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(xt).permute(0, 3, 1, 2),
            timestep=torch.tensor(t) * 1000,
            encoder_hidden_states=torch.tensor(context),
            pooled_projections=torch.tensor(pooled),
        ).sample.permute(0, 2, 3, 1)
    assert convert.error(ours, wanted) < 1e-4
    bundle = sd3_jax.load(str(workdir / "diffusers"), dtype="float32")
    again = bundle.velocity(xt, t, context, pooled)
    assert convert.error(again, np.asarray(ours)) < 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "original", "orbax"])
def test_the_byte_tower_is_left_out_with_a_warning(trained, tmp_path, caplog, layout):
    """The denoiser learned that tower's embeddings: CLIP's would not fit."""
    workdir, recipe = trained
    out = tmp_path / ("out.safetensors" if layout == "original" else "out")
    flags = [f"--config.convert.to={layout}", f"--config.convert.out={out}"]
    assert run(workdir, *flags, recipe=recipe) == 0
    config = quickstart.get_config("tiny")
    parts = model_parts.build_parts(config)
    mesh = sharding.make_mesh()
    params, _ = model_parts.trained_params(config, parts, workdir, mesh)
    sizes = [x.size for x in jax.tree.leaves(params["text"])]
    (warning,) = [x for x in caplog.messages if "byte text tower" in x]
    assert f"its {len(sizes)} tensors ({sum(sizes)} parameters)" in warning
    assert f"sd3-jax sample --workdir={workdir}" in warning
    bundle = sd3_jax.load(str(out), tokenizers_from=None)
    assert list(bundle.modules) == ["denoiser"]


def test_released_weights_are_joined_by_listing_them(tmp_path, caplog):
    """encode.weights completes a run; with config.weights it is not used, and said."""
    weights = miniature.folder("sd35_medium")
    flags = [f"--config.weights={weights}", f"--config.encode.weights={weights}"]
    assert run(tmp_path, *flags) == 0
    assert any("list both in config.weights" in x for x in caplog.messages)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--config.convert.to=diffuser", 'did you mean "diffusers"'),
        ("--config.convert.dtype=int8", "expected one of float32, float16, bfloat16"),
        ("--config.convert.out=configs", "exists; set a new path"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, flag, words):
    assert run(tmp_path, "--config.weights=x/y", flag) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sd3-jax: error:") and words in error


@pytest.mark.parametrize("job", ["convert", "sample"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "."])
def test_a_pickle_is_refused_with_the_way_out(tmp_path, capsys, job, name):
    file = tmp_path / ("pytorch_model.bin" if name == "." else name)
    file.write_bytes(b"\x80\x02}q\x00.")
    flags = [f"--config.weights={tmp_path / name}", "--config.sample.prompt=a fox"]
    assert main.main([job, TINY, f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{file} is a pickle" in error and "convert it to safetensors" in error


def test_without_a_checkpoint(tmp_path, capsys):
    assert run(tmp_path, recipe="--config=configs/quickstart.py:tiny") == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_an_adapter_in_the_names_of_each_tool(tmp_path, capsys):
    """From diffusers' names through all others and back, times its weight."""
    draw = torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.{i}.attn.to_{x}" for i in (0, 3) for x in "qv"]
    tensors = {
        f"transformer.{name}.lora_{side}.weight": torch.randn(shape, generator=draw)
        for name in names
        for side, shape in (("A", (3, 64)), ("B", (64, 3)))
    }
    source = str(tmp_path / "a.safetensors=0.5")
    safetensors.torch.save_file(tensors, source.removesuffix("=0.5"))
    base = miniature.folder("sd3_medium")
    for naming, out in (
        ("kohya", "lora_kohya.safetensors"),
        ("comfyui", "lora_comfyui.safetensors"),
        ("peft", "lora_peft/adapter_model.safetensors"),
        ("diffusers", "lora_diffusers/pytorch_lora_weights.safetensors"),
    ):
        flags = f"weights={base} sample.lora={source} convert.lora_format={naming}"
        assert run(tmp_path, *(f"--config.{flag}" for flag in flags.split())) == 0
        source = str(tmp_path / out)
        assert f"{source}: an adapter of denoiser" in capsys.readouterr().out
    again = safetensors.torch.load_file(source)
    assert again.keys() == tensors.keys()
    for layer in {key.rsplit(".", 2)[0] for key in tensors}:
        a, b = (again[f"{layer}.lora_{side}.weight"] for side in "AB")
        x, y = (tensors[f"{layer}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(b @ a, 0.5 * y @ x)


@pytest.mark.parametrize("names", ["", "{0},{0}"])
def test_one_adapter_at_a_time(names, tmp_path, capsys):
    base = miniature.folder("sd3_medium")
    lora = names.format(base)
    flags = f"weights={base} convert.lora_format=kohya sample.lora={lora}".split()
    assert run(tmp_path, *(f"--config.{flag}" for flag in flags)) == 2
    error = capsys.readouterr().err.strip()
    assert "with config.convert.lora_format it must name one" in error
    assert "\n" not in error


def test_a_run_without_a_lora_has_none_to_write(trained, capsys):
    workdir, recipe = trained
    flags = "--config.convert.lora_format=kohya"
    assert run(workdir, flags, recipe=recipe) == 2
    assert "trained no LoRA; with config.convert.lora_format" in capsys.readouterr().err
