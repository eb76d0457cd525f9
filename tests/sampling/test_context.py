"""Large pictures over the mesh: the same results, and a quarter of the memory."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.models.attention import attention
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.vae import VAE
from sd3_jax.sampling import compiled
from sd3_jax.tools.plan import hlo, link_traffic

PATH = Path(__file__).parents[2] / "benchmarks" / "context.py"
spec = importlib.util.spec_from_file_location("context_benchmark", PATH)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

MESHES = [
    dict(data=1, fsdp=1, context=4, tensor=2),
    dict(data=1, fsdp=2, context=2, tensor=2),  # 2 divides one batch and not the other
    dict(data=2, fsdp=2, context=1, tensor=1),  # the heads stay whole
]


def program(part, devices, side):
    mesh = benchmark.mesh(jax.devices()[:devices])
    return benchmark.program(part, mesh, side, **benchmark.SIZES)


@pytest.mark.parametrize(
    ("part", "rows", "tokens", "keys", "layers", "line", "share"),
    [  # Of the small denoiser's memory a block of logits, the same on both, is much.
        ("sample", 2, 128**2, 128**2 + 333, 2, 2 * 336 * 64, 0.66),
        ("decode", 1, 256**2, 256**2, 1, 2048 * 32, 0.35),
    ],
)
def test_2048_pixels_want_less_memory_on_four_devices(
    part, rows, tokens, keys, layers, line, share
):
    one, four = (
        program(part, n, 2048).compile(compiler_options=benchmark.COUNTED)
        for n in (1, 4)
    )
    assert benchmark.peak(four) <= share * benchmark.peak(one)
    text = four.as_text()
    mesh = dict(data=1, fsdp=1, context=4, tensor=1)
    found = [x for x, _ in link_traffic.collectives(hlo.parse(text), mesh)]
    size = lambda x: np.prod([int(d) for d in re.findall(r"\d+", x.shape)[1:]])
    # Keys and values are gathered; else only text and the lines at borders are sent.
    sent = [(x.kind, size(x)) for x in found if size(x) > line]
    assert sent == [("all-gather", rows * tokens * 64)] * layers * 2
    blocks = re.findall(rf"f32\[1,(\d+),{keys}\]", text)
    assert blocks and max(map(int, blocks)) < tokens / 32


@pytest.mark.parametrize("part", benchmark.PARTS)
def test_four_devices_compute_what_one_does(part, monkeypatch):
    monkeypatch.setattr(attention, "LIMIT", 2**18)  # several blocks of queries
    jax.clear_caches()
    one, four = (benchmark.run(program(part, n, 192)) for n in (1, 4))
    assert benchmark.apart(one, four) < 1e-4


@pytest.fixture(scope="module")
def autoencoder():
    module = VAE(channels=(8, 16), latent_channels=4, layers=1, groups=4)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    return module, jax.tree.map(benchmark.weight, tree.unbox(shapes))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_mesh_changes_no_picture(autoencoder, rows, sizes):
    module, weights = autoencoder
    image = np.random.default_rng(0).random((rows, 32, 24, 3), np.float32)
    run = jax.jit(lambda weights, image: module.apply(weights, image))
    wanted = run(weights, image)
    with compiled.on(sharding.make_mesh(**sizes, devices=devices(sizes))):
        found = run(weights, image)
    assert benchmark.apart(np.asarray(wanted), np.asarray(found)) < 1e-4
    assert found.sharding.shard_shape(found.shape)[1] < 32  # its height is shared


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_changes_no_gradient(sizes):
    """Of three weight sets and dual blocks, with text of odd lengths."""
    model = MMDiT(
        depth=3, width=32, num_heads=4, dual_blocks=1, weight_sets=3, text_split=5
    ).clone(dtype=jnp.float32, remat="attention")
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.standard_normal(shape, np.float32)
    args = normal(4, 8, 12, 16), draw.random(4, np.float32), normal(4, 14, 8)
    args += (normal(4, 8),)
    shapes = tree.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))
    weights = jax.tree.map(benchmark.weight, shapes)
    run = jax.jit(jax.grad(lambda w, *args: jnp.sum(model.apply(w, *args) ** 2)))
    wanted = run(weights, *args)
    with compiled.on(sharding.make_mesh(**sizes, devices=devices(sizes))):
        found = run(weights, *args)
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-4 * np.abs(x).max())


def devices(sizes):
    return jax.devices()[: np.prod(list(sizes.values()))]
