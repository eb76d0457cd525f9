"""The TPU compiler's program of a product of eight bits, compiled without a TPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd3_jax.tools.plan import hlo, matmul_costs, operation_costs, slices

ROOT = Path(__file__).parents[2]
CODE = """
from sd3_jax.tools.plan import aot, slices
aot.prepare()
import jax, jax.numpy as jnp
from flax import linen as nn
from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.models.layers import Mlp
from sd3_jax.params import quantization
mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=aot.devices(slices.find("v5e-4")))
x = jax.ShapeDtypeStruct((2, 256, 512), jnp.bfloat16)
key = jax.eval_shape(lambda: jax.random.key(0))
with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    boxed = jax.eval_shape(Mlp(name="block").init, key, x)["params"]
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree.unbox(boxed), sharding.shardings(boxed, mesh),
    )
    rounded = quantization.abstract({"block": shapes}, "int8_dynamic")["block"]
    run = jax.jit(lambda params, x: Mlp().apply({"params": params}, x))
    print(aot.compile(run.lower(rounded, x), {}).text)
"""


@pytest.fixture(scope="module")
def program():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    run = [sys.executable, "-c", CODE]
    done = subprocess.run(
        run, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return hlo.parse(done.stdout)


def test_both_products_have_int8_operands_and_int32_sums(program):
    bodies = list(program.computations.values())
    pairs = [(x, body) for body in bodies for x in body if x.opcode == "convolution"]
    assert len(pairs) >= 2
    for x, body in pairs:
        assert matmul_costs.rate(x, body) == "s8" and x.shapes[0].dtype == "s32"


def test_weights_are_gathered_as_int8(program):
    """Over FSDP; and the product is planned at the peak of int8."""
    ops = [x for body in program.computations.values() for x in body]
    gathers = [x for x in ops if x.opcode.startswith("all-gather")]
    shapes = [shape for x in gathers for shape in x.shapes]
    wide = [shape.dtype for shape in shapes if shape.elements >= 512 * 1024]
    assert wide and set(wide) == {"s8"}  # smaller: biases and scales
    chip = slices.find("v5e-1").generation
    cost = operation_costs.Cost(2.0, kind="matmul", eight_bits={"s8": 2.0})
    assert cost.compute_seconds(chip) == pytest.approx(2.0 / 393e12)
