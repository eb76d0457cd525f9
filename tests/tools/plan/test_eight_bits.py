"""Products of eight bits are planned at their own peak, mixed types are not."""

import math

import jax
import jax.numpy as jnp
import pytest

from sd3_jax import tree
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.params import quantization
from sd3_jax.tools.plan import (
    bounds,
    hlo,
    operation_costs,
    sampling_programs,
    slices,
)

CHIP = slices.find("v5e-1").generation
SIZE = 2.0 * 512 * 256 * 1024


def cost(left, right, total):
    text = (
        f"ENTRY %main (p: {left}[1]) -> {total}[1] {{\n"
        f"  %x = {left}[512,256]{{1,0}} parameter(0)\n"
        f"  %w = {right}[256,1024]{{1,0}} parameter(1)\n"
        f"  ROOT %y = {total}[512,1024]{{1,0}} convolution(%x, %w),"
        " dim_labels=bf_io->bf\n}\n"
    )
    module = hlo.parse(text)
    home = module["main"]
    return operation_costs.cost(home.root, home, module, 128)


@pytest.mark.parametrize(
    "left, right, total, peak",
    [
        ("s8", "s8", "s32", CHIP.int8),
        ("bf16", "s8", "f32", CHIP.peak),  # stored weights: multiplied as bfloat16
        ("bf16", "bf16", "f32", CHIP.peak),
        ("f8e4m3fn", "f8e4m3fn", "f32", CHIP.peak),  # a v5e has no unit for it
    ],
)
def test_the_operands_give_the_rate(left, right, total, peak):
    product = cost(left, right, total)
    assert product.flops == SIZE and product.kind == "matmul"
    assert product.compute_seconds(CHIP) == pytest.approx(SIZE / peak)


def test_a_fusion_of_both_kinds_takes_the_sum():
    text = (
        "%f (a: s8[1]) -> bf16[1] {\n"
        "  %a = s8[512,256]{1,0} parameter(0)\n"
        "  %b = s8[256,1024]{1,0} parameter(1)\n"
        "  %c = s32[512,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}\n"
        "  %d = bf16[512,1024]{1,0} convert(%c)\n"
        "  %e = bf16[1024,256]{1,0} parameter(2)\n"
        "  ROOT %g = bf16[512,256]{1,0} dot(%d, %e), lhs_contracting_dims={1}\n}\n\n"
        "ENTRY %main (p: s8[1]) -> bf16[1] {\n"
        "  %x = s8[512,256]{1,0} parameter(0)\n"
        "  %w = s8[256,1024]{1,0} parameter(1)\n"
        "  %v = bf16[1024,256]{1,0} parameter(2)\n"
        "  ROOT %y = bf16[512,256]{1,0} fusion(%x, %w, %v), kind=kOutput, calls=%f\n}\n"
    )
    module = hlo.parse(text)
    home = module["main"]
    both = operation_costs.cost(home.root, home, module, 128)
    assert both.flops == 2 * SIZE and both.eight_bits == {"s8": SIZE}
    assert both.compute_seconds(CHIP) == SIZE / CHIP.int8 + SIZE / CHIP.peak


def test_the_model_s_count_takes_the_rate_for_its_share():
    work = bounds.Work(linear=10e12, attention=1e12, padded=1e12, tokens=4096)
    plain = bounds.forward(work, CHIP, head=64)
    eight = bounds.forward(work, CHIP, head=64, eight_bits=8e12, rate=CHIP.int8)
    assert plain.linear == 10e12 / CHIP.peak and eight.attention == plain.attention
    assert eight.linear == pytest.approx(2e12 / CHIP.peak + 8e12 / CHIP.int8)
    assert bounds.forward(work, CHIP, head=64, eight_bits=0.0, rate=math.inf) == plain


@pytest.mark.parametrize("name, ratio", [("v5e-1", 1.995), ("v6e-1", 2), ("v5p-8", 2)])
def test_published_rates_of_int8(name, ratio):
    chip = slices.find(name).generation
    assert chip.eight_bits("s8") / chip.peak == pytest.approx(ratio, abs=1e-3)
    assert chip.eight_bits("f8e4m3fn") == chip.peak


def test_a_tpu7x_has_fp8():
    chip = slices.find("tpu7x-8").generation
    assert chip.eight_bits("f8e4m3fn") == 2 * chip.peak
    assert chip.eight_bits("s8") == chip.peak  # none is published


@pytest.mark.parametrize("kind", ["", "int8", "int8_dynamic"])
def test_the_blocks_products_are_counted_and_no_others(kind):
    """24 d^2 a token and block; 8 d^2 of dual attention; qkv of the last text."""
    d, depth, image, text = 64, 3, 256, 77
    model = MMDiT(depth=depth, width=d, num_heads=2, dual_blocks=1, pos_size=16)
    shapes = (1, 32, 32, 16), (1,), (1, text, 24), (1, 12)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = tree.unbox(jax.eval_shape(model.init, key, *args)["params"])
    if kind:
        rounded = lambda params: quantization.quantized(params, kind)
        params = jax.eval_shape(rounded, params)
    flops, rate = sampling_programs.eight_bits(params, CHIP, image, text)
    if kind != "int8_dynamic":  # stored kinds multiply in the model's dtype
        assert (flops, rate) == (0.0, math.inf)
        return
    joint = 24 * d**2 * (depth * image + (depth - 1) * text) + 6 * d**2 * text
    assert (flops, rate) == (joint + 8 * d**2 * image, CHIP.int8)
