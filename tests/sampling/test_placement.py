"""Weights that rest on the host: the same pictures, and one component at a time."""

import json

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import miniature
from parity.test_pipelines import control_net

import sd3_jax
from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import lora
from sd3_jax.params.adapters import Factors
from sd3_jax.sampling import placement
from sd3_jax.sampling.bundle import TEXT

SOURCE = "sd35_medium"
RUN = dict(height=32, width=32, max_sequence_length=8, steps=2)
PATHS = {
    "denoiser": ("blocks", "image", "attn", "to_qkv", "kernel"),
    "clip_l": ("blocks", "fc2", "kernel"),
}
PROMPTS = ["a <s> fox", "rain"]


def loaded(**options):
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    return sd3_jax.load(str(miniature.folder(SOURCE)), mesh, "float32", **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An embedding in ComfyUI's names, and a ControlNet of diffusers."""
    folder = tmp_path_factory.mktemp("placement")
    generator = np.random.default_rng(0)
    widths = {"clip_l": 64, "clip_g": 64, "t5xxl": 160}
    draw = lambda width: generator.normal(size=(2, width)).astype(np.float32)
    embedding = folder / "mine.safetensors"
    safetensors.numpy.save_file({k: draw(x) for k, x in widths.items()}, embedding)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(miniature.folder(SOURCE))
    control_net(pipe, "single").save_pretrained(folder / "net")
    return embedding, folder / "net"


def with_everything(files, **options):
    """A bundle with an embedding and an adapter, and a net for it."""
    embedding, net = files
    bundle = loaded(embeddings={embedding: "<s>"}, **options)
    bundle.load_adapter(adapter(bundle), "style", 0.7)
    return bundle, sd3_jax.load_control(str(net), bundle)


def adapter(bundle):
    changes = {}
    for component, path in PATHS.items():
        kernel = bundle.variables[component]["params"]
        for part in path:
            kernel = kernel[part]
        shapes = lora.layout(path[:-1], kernel.ndim).shapes(tuple(kernel.shape), 2)
        draw = np.random.default_rng(1).standard_normal
        changes[component] = {path: Factors(*(draw(x, np.float32) for x in shapes))}
    return changes


def paint(bundle, net, seed):
    hint = np.random.default_rng(2).random((1, 32, 32, 3), np.float32)
    control = sd3_jax.ControlInput(net, hint)
    return np.asarray(
        sd3_jax.generate(bundle, PROMPTS, seed=seed, control=control, **RUN)
    )


def on_devices(bundle):
    """Bytes on the devices, and of which components copies are there."""
    there = {id(host) for host, _ in bundle._stage._copies.values()}
    names = {
        name
        for name, variables in bundle.variables.items()
        if there & {id(x) for x in jax.tree.leaves(variables)}
    }
    kept = [x for x in jax.live_arrays() if x.sharding.memory_kind == "device"]
    return sum(x.nbytes for x in kept), names


@pytest.fixture(scope="module")
def whole(files):
    """Pictures and fingerprints of a bundle that is on the devices."""
    bundle, net = with_everything(files)
    prints = bundle.fingerprints(), bundle.fingerprint()
    return [paint(bundle, net, seed) for seed in (0, 1)], prints


@pytest.fixture(scope="module")
def sequential(files):
    return with_everything(files, placement="sequential")


def test_pictures_are_the_same_bit_for_bit_and_memory_does_not_grow(whole, sequential):
    sizes, (pictures, _) = [], whole
    for seed in (0, 1, 0, 1):
        np.testing.assert_array_equal(paint(*sequential, seed), pictures[seed])
        sizes.append(on_devices(sequential[0])[0])
    assert len({*sizes}) == 1, sizes


def test_components_take_turns_on_the_devices(sequential):
    bundle, _ = sequential
    bundle._stage.clear()
    empty, _ = on_devices(bundle)
    size = lambda names: sum(
        x.nbytes for name in names for x in jax.tree.leaves(bundle.variables[name])
    )
    cond = bundle.encode_prompts(PROMPTS, 8)
    held, names = on_devices(bundle)
    adapters = sum(x.nbytes for x in jax.tree.leaves(adapter(bundle)["clip_l"]))
    assert names == {*TEXT}
    assert held - empty == pytest.approx(size(TEXT) + adapters, abs=2e5)  # and results
    latents = sd3_jax.generate(bundle, cond, output="latents", guidance=1, **RUN)
    assert on_devices(bundle)[1] == {"denoiser"}
    bundle.decode(latents)
    assert on_devices(bundle)[1] == {"vae"}
    bundle.velocity(latents, np.ones(2, np.float32), *cond)
    assert on_devices(bundle)[1] == {"denoiser"}


def test_weights_stay_where_there_is_room(monkeypatch):
    host = jax.device_put(np.ones((2, 4), np.float32), jax.memory.Space.Host)
    stage = placement.Stage()
    monkeypatch.setattr(placement, "free_memory", lambda: 100)
    first, second = {"a": host}, {"b": host + 0}
    second = jax.tree.map(lambda x: jax.device_put(x, host.sharding), second)
    (kept,) = stage.enter(first).values()
    stage.enter(second, room=50.0)
    assert stage.enter(first, room=50.0)["a"] is kept
    stage.enter(second, room=200.0)
    assert stage.enter(first)["a"] is not kept


def test_fingerprints_are_those_of_weights_on_the_devices(whole, sequential):
    bundle = sequential[0]
    assert (bundle.fingerprints(), bundle.fingerprint()) == whole[1]
    assert "placement sequential" in repr(bundle)


def test_our_own_format_and_eight_bits(tmp_path):
    folder = tmp_path / "ours"
    only = ["denoiser"]
    sd3_jax.save(loaded(only=only), folder, "orbax")
    options = dict(quantize={"denoiser": "int8"}, only=only, tokenizers_from=None)
    mesh = sharding.make_mesh(fsdp=4, devices=jax.devices()[:4])
    theirs = sd3_jax.load(folder, mesh, "float32", **options)
    ours = sd3_jax.load(folder, mesh, "float32", placement="sequential", **options)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(ours.variables)}
    assert kinds == {"pinned_host"}
    jax.tree.map(np.testing.assert_array_equal, ours.variables, theirs.variables)


def test_the_job_encodes_all_texts_before_it_paints(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"fox {i}", "negative": "rain"} for i in range(9)]
    rows[1]["prompt_weighting"] = "parentheses"
    rows[1]["prompt"] = "a (fox"  # no picture
    prompts.write_text("\n".join(map(json.dumps, rows)))
    flags = {"weights": miniature.folder(SOURCE), "sample.prompts_file": prompts}
    flags |= {"sample.steps": 1, "sample.batch_size": 2, "image.height": 32}
    flags |= {"image.width": 32, "mesh.data": 1, "mesh.fsdp": 1, "mesh.context": 8}
    encoders = []
    enter = placement.Stage.enter

    def entered(stage, arguments, **options):
        encoders.append(isinstance(arguments, dict) and "t5" in arguments)
        return enter(stage, arguments, **options)

    monkeypatch.setattr(placement.Stage, "enter", entered)
    for name in "all", "sequential":
        options = {**flags, "sample.placement": name}
        options = [f"--config.{key}={value}" for key, value in options.items()]
        recipe = "--config=configs/released.py:tiny"
        workdir = f"--workdir={tmp_path / name}"
        assert main.main(["sample", recipe, workdir, *options]) == 0
    files = sorted(path.name for path in (tmp_path / "all/samples").iterdir())
    assert len(files) == 8
    for file in files:
        pixels = [
            (tmp_path / name / "samples" / file).read_bytes()
            for name in ("all", "sequential")
        ]
        assert pixels[0] == pixels[1]
    # Prompts and negative ones of all batches come first.
    first = encoders.index(False)
    assert first == 8 and all(encoders[:first]) and not any(encoders[first + 1 :])


def test_mistakes(sequential):
    bundle, _ = sequential
    with pytest.raises(UserError, match='placement "sequental".*"sequential"'):
        loaded(placement="sequental")
    with pytest.raises(UserError, match='merged and saved.*placement="all"'):
        bundle.merge_adapters()
    with pytest.raises(UserError, match="guide rests on the host"):
        sd3_jax.generate(
            bundle, "a", guide=bundle, guidance_method="autoguidance", **RUN
        )
    cond = bundle.encode_prompts("a", 8)
    x = np.zeros((1, 4, 4, 16), np.float32)
    run = jax.jit(lambda x: bundle.velocity(x, np.ones(1, np.float32), *cond))
    with pytest.raises(UserError, match="inside jax.jit"):
        run(x)
