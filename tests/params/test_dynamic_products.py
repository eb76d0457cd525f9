"""Products of eight bits: exact sums, shared scales over a mesh, and what stays."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from params.test_quantization import MAPS, Stack, laid_over, relative, shaken

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.params import lora, parametrization, quantization
from sd3_jax.params.quantization import (
    DynamicFloat8,
    DynamicInt8,
    Quantized,
    quantize,
    require_units,
)

DYNAMIC = {"int8_dynamic": DynamicInt8, "fp8_dynamic": DynamicFloat8}
MAPPED = pytest.mark.parametrize("name", MAPS)
KINDS = pytest.mark.parametrize("kind", DYNAMIC)


def product(x, weight, inputs):
    return parametrization.product(x, weight, (None,) * weight.ndim, inputs)


@KINDS
@MAPPED
def test_the_product_is_qwixs(key, name, kind):
    """The same rounded operands, multiplied and scaled by another library."""
    shape, inputs, last = MAPS[name]
    unlike = jnp.logspace(-2, 2, 5).reshape(5, *[1] * inputs)  # tokens
    x = jax.random.normal(key, (2, 5, *last)) * unlike
    weight = quantize(jax.random.normal(key, shape), DYNAMIC[kind], range(inputs))
    rounded = quantize(x, DYNAMIC[kind], range(2, x.ndim))
    assert rounded.scale.shape == (2, 5, *[1] * inputs)  # one a token
    pair = [qwix.QArray(y.q, y.scale) for y in (rounded, weight)]
    axes = tuple(range(2, x.ndim)), tuple(range(inputs))
    theirs = qwix.dot_general(*pair, (axes, ((), ())))
    ours = product(x, weight, inputs)
    assert ours.shape == theirs.shape and relative(ours, theirs) < 1e-6
    # Against the product without rounding: both operands are off by up to a half step.
    most = {"int8_dynamic": 0.012, "fp8_dynamic": 0.04}[kind]
    exact = jnp.tensordot(x, weight.array(), inputs)
    assert 1e-3 < relative(ours, exact) < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_int8_are_exact(dtype):
    """9728 products of 127 * 127 need 28 bits: not int8's, bfloat16's or float32's."""
    x = jnp.ones((1, 1, 9728), dtype).at[0, 0, 0].set(-126 / 127)
    weight = quantize(jnp.ones((9728, 2)), DynamicInt8, [0])
    exact = 127 * 127 * 9727 - 127 * 126
    y = product(x, weight, 1)
    assert y.dtype == dtype
    got = np.asarray(y, np.float32)[0, 0]
    tolerance = {"float32": 1e-7, "bfloat16": 4e-3}[dtype]
    np.testing.assert_allclose(got, exact / 127**2, rtol=tolerance)


@KINDS
def test_zeros_stay_and_nothing_hides_a_nan(kind):
    weight = quantize(jnp.ones((4, 3)), DYNAMIC[kind], [0])
    rows = [[0.0] * 4, [1e-42, 0, 0, 0], [jnp.nan, 1, 1, 1], [jnp.inf, 1, 1, 1]]
    y = product(jnp.array([rows]), weight, 1)[0]
    assert not y[0].any() and (jnp.abs(y[1]) <= 1e-41).all()
    assert not jnp.isfinite(y[2:]).any()


@pytest.fixture(scope="module")
def mmdit():
    sizes = dict(depth=3, width=64, num_heads=2, dual_blocks=1, pos_size=8)
    model = MMDiT(**sizes, dtype=jnp.float32, remat="none")
    keys = jax.random.split(jax.random.key(1), 3)
    args = (
        jax.random.normal(keys[0], (2, 8, 8, 16)),
        jnp.array([0.2, 0.7]),
        jax.random.normal(keys[1], (2, 6, 24)),
        jax.random.normal(keys[2], (2, 12)),
    )
    shapes = tree.unbox(jax.eval_shape(model.init, keys[0], *args)["params"])
    params = shaken(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    return params, jax.jit(lambda params: model.apply({"params": params}, *args))


@pytest.mark.parametrize("kind, most", [("int8_dynamic", 0.03), ("fp8_dynamic", 0.08)])
def test_all_products_of_the_blocks_are_of_eight_bits(mmdit, kind, most):
    params, velocity = mmdit
    rounded = quantization.quantized(params, kind)
    assert 1e-3 < relative(velocity(rounded), velocity(params)) < most
    kernels = lora.kernels(rounded)
    eight = {path for path, x in kernels.items() if isinstance(x, Quantized)}
    assert {path[0] for path in eight} == {"blocks", "dual_blocks", "last_block"}
    assert not any("adaln" in path for path in eight)
    # Each once: in a scan's body, or in the last block.
    text = velocity.lower(rounded).as_text()
    sort, total = {"int8_dynamic": ("i8", "i32"), "fp8_dynamic": ("f8E4M3FN", "f32")}[
        kind
    ]
    dots = re.findall(
        r"dot_general .*: \(tensor<(.*)>, tensor<(.*)>\) -> .*x(\w+)>", text
    )
    dots = [(a, b, out) for a, b, out in dots if a.endswith(f"x{sort}")]
    assert len(dots) == len(eight)
    assert all(b.endswith(f"x{sort}") and out == total for _, b, out in dots)


def test_a_lora_lies_beside_them():
    x = jax.random.normal(jax.random.key(3), (2, 6, 32))
    params = shaken(tree.unbox(Stack().init(jax.random.key(0), x)["params"]))
    run = jax.jit(lambda params: Stack().apply({"params": params}, x))
    rounded = quantization.quantized(params, "int8_dynamic")
    pairs = lora.init(jax.random.key(0), params, rank=2)
    pairs = jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), pairs)
    attached = run(lora.attach(rounded, pairs))
    assert relative(attached, run(lora.merge(params, pairs))) < 0.04
    assert relative(attached, run(rounded)) > 0.05
    merged = lora.merge(rounded, pairs)  # dequantized, as of stored kinds
    leaves = jax.tree.leaves(merged, is_leaf=parametrization.is_leaf)
    assert not any(map(parametrization.is_leaf, leaves))


@KINDS
@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)]
)
def test_over_a_mesh_each_token_has_one_scale(sizes, kind):
    """fc2 and out contract axes that "tensor" cuts: a maximum over all shards."""
    x = jax.random.normal(jax.random.key(3), (8, 6, 32))
    boxed = Stack().init(jax.random.key(0), x)["params"]
    params, mesh = shaken(tree.unbox(boxed)), sharding.make_mesh(**sizes)
    rounded = quantization.quantized(params, kind)
    one_device = jax.jit(Stack().apply)({"params": rounded}, x)
    placed = laid_over(mesh, boxed, params, kind)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        args = {"params": jax.device_put(rounded, placed)}, x
        program = jax.jit(Stack().apply)
        on_mesh = program(*args)
        compiled = program.lower(*args).compile().as_text()
    assert relative(on_mesh, one_device) < 1e-5
    if kind == "int8_dynamic":  # gathered and summed as integers
        assert re.search(r"s8\[.*all-gather|all-gather.*s8\[", compiled)
        if "tensor" in sizes:
            assert re.search(r"s32\[.*all-reduce\(", compiled)


def device(platform, kind, **facts):
    return SimpleNamespace(platform=platform, device_kind=kind, **facts)


@pytest.mark.parametrize(
    "device, fits",
    [
        (device("gpu", "NVIDIA H200", compute_capability="9.0"), True),
        (device("gpu", "NVIDIA L4", compute_capability="8.9"), True),
        (device("gpu", "NVIDIA B200", compute_capability="10.0"), True),
        (device("gpu", "NVIDIA A100", compute_capability="8.0"), False),
        (device("gpu", "AMD Instinct", compute_capability="gfx942"), False),
        (device("tpu", "TPU v6 lite"), False),
        (device("tpu", "TPU7x"), True),
        (device("cpu", "cpu"), True),
    ],
)
def test_fp8_products_need_their_unit(device, fits):
    for kind in ("", "int8", "fp8", "int8_dynamic"):
        require_units(kind, device)
    if fits:
        return require_units("fp8_dynamic", device)
    with pytest.raises(
        UserError, match=f'{device.device_kind} has no .*"int8_dynamic"'
    ):
        require_units("fp8_dynamic", device)
