"""The gradient of sharded weights, made piece by piece, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from sd3_jax.distributed import sharding
from sd3_jax.models import sharded_linear

MESHES = [dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)]
MESHES += [dict(data=2, fsdp=1, context=2, tensor=2)]  # weights are whole
MAPS = {  # shape of x, shape of the kernel, its axes, how many are contracted
    "fc1": ((8, 6, 16), (16, 32), ("embed", "mlp"), 1),
    "fc2": ((8, 6, 32), (32, 16), ("mlp", "embed"), 1),
    "qkv": ((8, 6, 16), (16, 3, 4, 4), ("embed", None, "heads", None), 1),
    "out": ((8, 6, 4, 4), (4, 4, 16), ("heads", None, "embed"), 2),
    "adaln": ((8, 16), (16, 6, 16), (None, None, "embed"), 1),
    "many rows": ((64, 16), (16, 6, 16), (None, None, "embed"), 1),
    "none sharded": ((8, 6, 16), (16, 5), (None, None), 1),
    "does not divide": ((8, 6, 15), (15, 8), ("embed", "mlp"), 1),
    "few pictures": ((3, 6, 16), (16, 32), ("embed", "mlp"), 1),
}


def loss(function, axes, inputs):
    return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel, axes, inputs)))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("sizes", MESHES, ids=["hsdp", "all", "whole"])
def test_the_gradient_is_the_plain_ones(name, sizes):
    shape, kernel, axes, inputs = MAPS[name]
    keys = jax.random.split(jax.random.key(0))
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel)
    plain = loss(lambda x, k, _, n: sharded_linear.contract(x, k, n), axes, inputs)
    wanted = jax.grad(plain, (0, 1))(x, kernel)
    mesh = sharding.make_mesh(**sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        found = jax.jit(jax.grad(loss(sharded_linear.linear, axes, inputs), (0, 1)))(
            x, kernel
        )
    for a, b in zip(found, wanted):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["fc1", "qkv", "out"])
def test_bfloat16_is_summed(name):
    shape, kernel, axes, inputs = MAPS[name]
    x, kernel = jnp.ones(shape, jnp.bfloat16), jnp.ones(kernel, jnp.bfloat16)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    total = lambda x, k: sharded_linear.linear(x, k, axes, inputs).sum()
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        found = jax.jit(jax.grad(total, 1))(x, kernel)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), 48.0)  # 8 x 6 rows of ones


def test_the_gradient_leaves_in_pieces():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    shape, kernel, axes, inputs = MAPS["qkv"]
    place = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    x, kernel = place(shape, sharding.BATCH), place(kernel, "fsdp")
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        grad = jax.jit(jax.grad(loss(sharded_linear.linear, axes, inputs), 1))
        text = grad.lower(x, kernel).as_text()
        made = grad.lower(x, kernel).compile().output_shardings
    assert "reduce_scatter" in text
    assert made.spec[0] == "fsdp"


def test_devices_with_the_same_rows_read_a_piece_of_the_weights_each():
    mesh = sharding.make_mesh(data=2, fsdp=1, context=2, tensor=2)
    shape, kernel, axes, inputs = MAPS["adaln"]
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct(kernel, jnp.float32)

    def flops(function, *rest):
        run = jax.jit(lambda x, kernel: function(x, kernel, *rest))
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
            return run.lower(x, weights).compile().cost_analysis()["flops"]

    whole = flops(sharded_linear.contract, inputs)
    assert flops(sharded_linear.linear, axes, inputs) < 0.3 * whole
