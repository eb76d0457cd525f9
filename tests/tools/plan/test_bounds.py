"""Floors of compiled programs against figures worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from sd3_jax.errors import UserError
from sd3_jax.models.attention import attention
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.tools.plan import bounds, plan_table, slices

SIZES = {24: 1536, 38: 2432}


def ceiling(depth, generation, *, again=0.0, padded=4608):
    """The bound MFU at 1024 pixels and 154 text tokens, if compute binds."""
    model = MMDiT(depth=depth, width=SIZES[depth], num_heads=depth)
    total = model.flops(height=128, width=128, text=154, text_dim=4096)
    work = bounds.work(model, tokens=4096, text=154, padded=padded, total=total)
    chip = slices.GENERATIONS[generation]
    time = bounds.training(work, chip, head=64, again=again)
    return 3 * total / chip.peak / time.total


@pytest.mark.parametrize(
    "depth, generation, wanted",
    [(24, "v5p", 0.64), (24, "v6e", 0.41), (38, "v5p", 0.72), (38, "v6e", 0.50)],
)
def test_ceilings_without_recomputation(depth, generation, wanted):
    assert ceiling(depth, generation) == pytest.approx(wanted, abs=0.01)


def test_what_costs():
    best = ceiling(24, "v5p")
    assert ceiling(24, "v5p", again=0.33) < best
    assert ceiling(24, "v5p", again=1.0) < ceiling(24, "v5p", again=0.99) - 0.02
    assert ceiling(24, "v5p", padded=4352) > best


@pytest.mark.parametrize("depth, teraflops", [(24, 8.437), (38, 29.60)])
def test_the_count_is_the_papers(depth, teraflops):
    model = MMDiT(depth=depth, width=SIZES[depth], num_heads=depth)
    total = model.flops(height=128, width=128, text=154, text_dim=4096)
    assert total / 1e12 == pytest.approx(teraflops, rel=0.002)


def test_the_least_that_must_be_sent():
    one = bounds.least_wire(1000, shards=1, copies=1)
    assert one == 0
    assert bounds.least_wire(1600, shards=16, copies=1) == 3 * 2 * 1500
    assert bounds.least_wire(1600, shards=1, copies=4) == 4 * 1600 * 3 / 4


@pytest.mark.parametrize(
    "name, chips, devices, topology",
    [
        ("v5e-256", 256, 256, "v5e:16x16"),
        ("v5p-128", 64, 64, "v5:4x4x4"),
        ("v6e-16", 16, 16, "v6e:4x4"),
        ("tpu7x-128", 64, 128, "tpu7x:4x4x4"),
        ("v5litepod-16", 16, 16, "v5e:4x4"),
    ],
)
def test_slices(name, chips, devices, topology):
    found = slices.find(name)
    assert (found.chips, found.devices, found.topology) == (chips, devices, topology)


def test_a_v5e_has_google_s_name_too():
    assert slices.find("v5litepod-16").name == "v5e-16"
    names = "v5e-16", "2xv5e-256", "v5litepod-8", "v5p-8", "tpu7x-8"
    clouds = "v5litepod-16", "v5litepod-256", "v5litepod-8", "v5p-8", "tpu7x-8"
    assert tuple(map(slices.cloud_name, names)) == clouds
    rows = [dict(slice=x, program="train") for x in ("v5p-8", "v5e-16", "v5e-16")]
    pytest.importorskip("libtpu")
    told = [line for line in plan_table.notes(rows) if "litepod" in line]
    assert told == ["v5e-16: v5litepod-16 to gcloud and in launch/'s ACCELERATOR_TYPE"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("v5q-16", 'such as v5e-16 or 2xv5e-16, .*did you mean "v5'),
        ("v5e-20", "expected one of v5e-1, v5e-4"),
        ("v5p-9", "expected one of v5p-8, v5p-16"),
    ],
)
def test_no_such_slice(name, words):
    with pytest.raises(UserError, match=words):
        slices.find(name)


@pytest.mark.parametrize("dual", [0, 1])
def test_the_count_is_the_compilers(dual, monkeypatch):
    """Of a block and the last one, unrolled, with attention by XLA: to 2 %."""
    monkeypatch.setattr(attention, "CACHE", attention.LIMIT)  # it sees a loop once
    model = MMDiT(
        depth=2,
        width=1536,
        num_heads=24,
        dual_blocks=dual,
        remat="none",
        attention="xla",
    )
    shapes = ((1, 32, 32, 16), (1,), (1, 154, 4096), (1, 2048))
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    key = jax.eval_shape(lambda: jax.random.key(0))
    variables = jax.eval_shape(model.init, key, *args)
    counted = jax.jit(model.apply).lower(variables, *args).cost_analysis()["flops"]
    ours = model.flops(height=32, width=32, text=154, text_dim=4096)
    assert ours == pytest.approx(counted, rel=0.02)
