"""Weights in eight bits: how near they are, and that models compute with them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.models.denoiser_blocks import Projections
from sd3_jax.models.layers import Mlp, modulate
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.scan import scanned
from sd3_jax.models.t5 import T5Encoder
from sd3_jax.params import lora, parametrization, quantization
from sd3_jax.params.quantization import STORED, Float8, Int8, Quantized, quantize

# The largest error of a weight, over its output's largest, and of all together.
BOUNDS = {"int8": (0.5 / 127, 0.009), "fp8": (16 / 448, 0.03)}
MAPS = {  # a kernel's shape, its input axes, the last axes of x
    "fc1": ((48, 64), 1, (48,)),
    "qkv": ((48, 3, 4, 16), 1, (48,)),
    "out": ((4, 16, 48), 2, (4, 16)),
}


def shaken(params, key=7):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, noisy)


def relative(a, b):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", MAPS)
def test_each_output_is_as_near_as_its_largest_weight_allows(key, name, kind):
    shape, inputs, _ = MAPS[name]
    x = jax.random.normal(key, shape) * jnp.logspace(-3, 3, shape[-1])  # unlike outputs
    x = x.at[..., 0].set(0)
    axes = range(inputs)
    made = quantize(x, STORED[kind], axes)
    assert made.shape == shape and made.q.dtype == STORED[kind].TYPE
    assert made.q.dtype.itemsize == 1 and made.scale.shape[inputs:] == shape[inputs:]
    most, together = BOUNDS[kind]
    error = np.abs(made.array() - x)
    assert (error <= 1.001 * most * np.abs(x).max(tuple(axes), keepdims=True)).all()
    assert relative(made.array(), x) < together
    assert not made.array()[..., 0].any()


@pytest.mark.parametrize("kind", STORED)
def test_on_the_host_it_is_made_alike(kind, monkeypatch):
    x = np.random.default_rng(0).normal(size=(37, 4, 5)).astype(np.float16)
    monkeypatch.setattr(quantization, "CHUNK", 100)  # several parts
    for axes, shape in ((0,), (1, 4, 5)), ((0, 1), (1, 1, 5)):
        made = quantize(jnp.asarray(x), STORED[kind], axes)
        q, scale = quantization.on_host(x, STORED[kind], shape)
        assert q.dtype == made.q.dtype and q.shape == x.shape
        np.testing.assert_array_equal(scale, made.scale)
        np.testing.assert_array_equal(q.astype(np.float32), made.q.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", MAPS)
def test_the_product_is_the_arrays(key, name, kind, dtype):
    shape, inputs, last = MAPS[name]
    x = jax.random.normal(key, (2, 5, *last)).astype(dtype)
    made = quantize(jax.random.normal(key, shape), STORED[kind], range(inputs))
    axes = (None,) * len(shape)
    found = parametrization.product(x, made, axes, inputs)
    wanted = parametrization.product(x.astype(jnp.float32), made.array(), axes, inputs)
    assert found.dtype == dtype
    assert relative(found, wanted) < {"float32": 1e-6, "bfloat16": 6e-3}[dtype]


@pytest.fixture(scope="module")
def mmdit():
    sizes = dict(depth=4, width=64, num_heads=2, dual_blocks=1, pos_size=8)
    model = MMDiT(**sizes, dtype=jnp.float32, remat="full")
    keys = jax.random.split(jax.random.key(1), 3)
    args = (
        jax.random.normal(keys[0], (2, 8, 8, 16)),
        jnp.array([0.2, 0.7]),
        jax.random.normal(keys[1], (2, 6, 24)),
        jax.random.normal(keys[2], (2, 12)),
    )
    params = shaken(tree.unbox(jax.jit(model.init)(keys[0], *args)["params"]))
    return params, jax.jit(lambda params: model.apply({"params": params}, *args))


@pytest.mark.parametrize("kind, most", [("int8", 0.02), ("fp8", 0.06)])
def test_the_mmdits_blocks_under_scan_and_remat(mmdit, kind, most):
    params, velocity = mmdit
    made = quantization.quantized(params, kind)
    found = velocity(made)
    assert relative(found, velocity(parametrization.arrays(made))) < 1e-5
    assert 1e-3 < relative(found, velocity(params)) < most
    there = {path: kernel for path, kernel in lora.kernels(made).items()}
    eight = {path[0] for path, x in there.items() if isinstance(x, STORED[kind])}
    assert eight == {"blocks", "dual_blocks", "last_block"}
    wide = {path[0] for path, x in there.items() if not isinstance(x, Quantized)}
    ends = {"context_embed", "final", "final_adaln", "patch_embed"}
    assert wide == ends | {"pooled_embed", "time_embed"}
    plain = jax.tree.map(parametrization.is_leaf, made, is_leaf=parametrization.is_leaf)
    assert sum(jax.tree.leaves(plain)) == sum(path[0] in eight for path in there)


def test_a_lora_lies_beside_eight_bits(mmdit):
    params, velocity = mmdit
    made = quantization.quantized(params, "int8")
    pairs = {}
    for path in quantization.quantizable_paths(params):
        kernel = lora.kernels(params)[path]
        a, b = lora.layout(path, kernel.ndim).shapes(kernel.shape, 2)
        pairs[path] = {"a": 0.1 * jnp.ones(a), "b": 0.1 * jnp.ones(b)}
    pairs = lora.nested(pairs)
    attached, merged = lora.attach(made, pairs), lora.merge(made, pairs)
    assert not any(
        map(
            parametrization.is_leaf,
            jax.tree.leaves(merged, is_leaf=parametrization.is_leaf),
        )
    )
    found = velocity(attached)
    assert relative(found, velocity(merged)) < 1e-5
    assert relative(found, velocity(made)) > 0.05
    other = quantization.quantized(
        lora.attach(params, pairs), "int8"
    )  # as a run has it
    chex.assert_trees_all_equal(other, attached)


@pytest.mark.parametrize("kind, most", [("int8", 0.02), ("fp8", 0.06)])
def test_t5(key, kind, most):
    model = T5Encoder(50, 2, 48, 3, 16, 96, dtype=jnp.float32)
    ids = jax.random.randint(key, (2, 7), 0, 50)
    variables = tree.unbox(model.init(key, ids))
    made = {"params": quantization.quantized(variables["params"], kind)}
    run = jax.jit(model.apply)
    assert {
        path[-1] for path in quantization.quantizable_paths(variables["params"])
    } == {*("to_qkv", "to_out", "wi", "wo")}
    assert relative(run(made, ids), run(parametrization.arrays(made), ids)) < 1e-5
    assert 1e-4 < relative(run(made, ids), run(variables, ids)) < most


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        attn = Projections(32, 4, False, dtype=jnp.float32, name="attn")
        q, k, v = attn.qkv(x)
        x = modulate(x + attn.project(jnp.sin(q) * k + v), x[:, 0], x[:, 1])
        return x + Mlp(2, jnp.float32, name="mlp")(x)


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        body = lambda block, x: (block(x), None)
        return scanned(body, 2, remat="full")(Block(name="blocks"), x)[0]


def laid_over(mesh, boxed, params, kind):
    """The shardings of rounded weights over a mesh."""
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        sharding.shardings(boxed, mesh),
    )
    return jax.tree.map(lambda x: x.sharding, quantization.abstract(shapes, kind))


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)]
)
def test_over_a_mesh_it_lies_as_its_weights_and_is_the_same(sizes, kind):
    x = jax.random.normal(jax.random.key(3), (8, 6, 32))
    boxed = Stack().init(jax.random.key(0), x)["params"]
    params, mesh = shaken(tree.unbox(boxed)), sharding.make_mesh(**sizes)
    made = quantization.quantized(params, kind)
    wanted = jax.jit(Stack().apply)({"params": made}, x)
    placed = laid_over(mesh, boxed, params, kind)
    qkv = placed["blocks"]["attn"]["to_qkv"]["kernel"]
    out = placed["blocks"]["attn"]["to_out"]["kernel"]
    assert qkv.q.spec[1] == out.q.spec[3] == out.scale.spec[3] == "fsdp"
    assert not {"fsdp"} & {*qkv.scale.spec} and out.scale.spec[1] is None
    assert qkv.q.spec[3] == qkv.scale.spec[3] == out.q.spec[1]
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        found = jax.jit(Stack().apply)({"params": jax.device_put(made, placed)}, x)
    assert relative(found, wanted) < 1e-5


def test_the_plain_program_is_what_it_was(mmdit):
    """No leaf of ours, no trace of eight bits."""
    params, velocity = mmdit
    text = velocity.lower(params).as_text()
    assert "i8" not in text and "f8E4M3" not in text
    assert "i8" in velocity.lower(quantization.quantized(params, "int8")).as_text()


def test_its_fingerprint_is_of_its_bits(mmdit):
    params, _ = mmdit
    prints = {
        tree.fingerprint(made)
        for made in (params, *(quantization.quantized(params, kind) for kind in STORED))
    }
    assert len(prints) == 3


def test_the_kinds():
    assert STORED == {"int8": Int8, "fp8": Float8}
