"""Released weights in eight bits, rounded as they stream in, and jobs that use them."""

import json

import jax
import numpy as np
import pytest
from parity import miniature

import sd3_jax
from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import lora, parametrization, quantization
from sd3_jax.weights import sharded_load

BOTH = {"denoiser": "int8", "t5": "int8"}
FOLDER = "sd35_medium"  # of all kinds of blocks
RUN = dict(height=64, width=64, steps=2, max_sequence_length=20, output="latents")


def load(source=None, mesh=None, **options):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    source = str(source or miniature.folder(FOLDER))
    return sd3_jax.load(source, mesh=mesh, **dict(dtype="float32") | options)


@pytest.fixture(scope="module")
def plain():
    return load()


@pytest.fixture(scope="module")
def eight():
    return load(quantize=BOTH)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim)
        x, y = (np.asarray(z).astype(np.float32) for z in (x, y))
        np.testing.assert_allclose(x, y, rtol=1e-6)


def test_what_streams_in_is_what_the_arrays_would_become(plain, eight):
    for name, variables in plain.variables.items():
        wanted = variables
        if name in BOTH:
            wanted = variables | {
                "params": quantization.quantized(variables["params"], "int8")
            }
            paths = quantization.quantizable_paths(variables["params"])
            assert len(paths) == (29 if name == "denoiser" else 4), paths
        same(eight.variables[name], wanted)
    assert eight.quantize == BOTH and "t5 int8" in repr(eight)
    assert eight.fingerprint() != plain.fingerprint()


def test_no_more_is_made_than_a_tensor_and_what_stays(monkeypatch):
    """Buffers of a whole leaf are of eight bits from the start."""
    made, original = [], sharded_load._aligned

    def listen(shape, dtype):
        made.append((tuple(shape), np.dtype(dtype).itemsize))
        return original(shape, dtype)

    monkeypatch.setattr(sharded_load, "_aligned", listen)
    bundle = load(quantize=BOTH, dtype="bfloat16")
    for name in BOTH:
        for path in quantization.quantizable_paths(bundle.variables[name]["params"]):
            kernel = lora.kernels(bundle.variables[name]["params"])[path]
            if path[0] == "last_block":  # final_adaln has the shape of one of them
                continue
            assert (kernel.shape, 1) in made and (kernel.shape, 2) not in made, path


def test_on_a_mesh_and_of_our_own_format(plain, eight, tmp_path):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    sd3_jax.save(plain, tmp_path / "ours", "orbax")
    words = str(miniature.folder(FOLDER))
    own = load(tmp_path / "ours", mesh, quantize=BOTH, tokenizers_from=words)
    same(own.variables, load(mesh=mesh, quantize=BOTH).variables)
    kernel = own.variables["denoiser"]["params"]["blocks"]["image"]["attn"]["to_qkv"]
    assert kernel["kernel"].q.sharding.spec[1] == "fsdp"
    latents = [sd3_jax.generate(x, ["a red fox"], **RUN) for x in (own, eight)]
    np.testing.assert_allclose(*latents, rtol=1e-3, atol=1e-3 * np.std(latents[0]))


def test_pictures_are_near(plain, eight):
    wanted, found = (sd3_jax.generate(x, ["a fox"], **RUN) for x in (plain, eight))
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.05


def test_pictures_by_products_of_eight_bits(plain):
    dynamic = load(quantize={"denoiser": "int8_dynamic"})
    exact, latents = (sd3_jax.generate(x, ["a fox"], **RUN) for x in (plain, dynamic))
    error = np.linalg.norm(latents - exact) / np.linalg.norm(exact)
    assert 1e-4 < error < 0.1
    kernels = lora.kernels(dynamic.variables["denoiser"]["params"])
    eight = [path for path, x in kernels.items() if parametrization.is_leaf(x)]
    assert eight and not any("adaln" in path for path in eight)
    assert dynamic.quantize == {"denoiser": "int8_dynamic"}


def test_what_is_saved_is_what_it_computes_with(eight, tmp_path):
    sd3_jax.save(eight, tmp_path / "saved", "diffusers")
    again = load(tmp_path / "saved")
    made = parametrization.arrays(eight.variables["denoiser"])
    same(again.variables["denoiser"], made)


@pytest.mark.parametrize(
    "quantize, options, said",
    [
        ({"denoiser": "int4"}, {}, 'denoiser: "int4"; did you mean "int8"?'),
        ({"denoiser": "int8_dynamc"}, {}, 'did you mean "int8_dynamic"?'),
        ({"t5": "int8_dynamic"}, {}, 't5: "int8_dynamic"; expected one of int8, fp8'),
        ({"denoizer": "int8"}, {}, '"denoizer"; did you mean "denoiser"?'),
        (
            {"t5": "int8"},
            dict(dtype="stored"),
            'cannot be combined with dtype="stored"',
        ),
        ({"vae": "int8"}, {}, "expected one of denoiser, t5"),
    ],
)
def test_mistakes_are_told(quantize, options, said):
    with pytest.raises(UserError) as caught:
        load(quantize=quantize, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_that_is_not_there():
    source = miniature.folder(FOLDER) / "transformer"
    options = dict(tokenizers_from=str(miniature.folder(FOLDER)))
    with pytest.raises(UserError, match="has no t5 to quantize, only denoiser"):
        load(source, quantize={"t5": "int8"}, **options)


def test_sample_paints_by_them_and_says_so(tmp_path, capsys):
    flags = [
        *("sample", "--config=configs/released.py:tiny", f"--workdir={tmp_path}"),
        f"--config.weights={miniature.folder(FOLDER)}",
        "--config.sample.prompt=a red fox",
        "--config.quantize.t5=fp8",
    ]
    assert main.main([*flags, "--config.quantize.denoiser=int8"]) == 0
    (line,) = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    assert line["quantize"] == {"denoiser": "int8", "t5": "fp8"}
    assert main.main([*flags, "--config.quantize.denoiser=int9"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    wanted = "expected one of int8, fp8, int8_dynamic, fp8_dynamic"
    assert f'config.quantize.denoiser = "int9": {wanted}; did you mean "int8"?' in error
