"""MMDiT: published sizes, the identity at birth, and options that change nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax import tree
from sd3_jax.models import position_table
from sd3_jax.models.layers import patchify, unpatchify
from sd3_jax.models.mmdit import Block, MMDiT
from sd3_jax.models.position_table import positions
from sd3_jax.models.scan import REMAT

SMALL = dict(depth=3, width=32, num_heads=2, channels=4, pos_size=8, pos_base=4)


def inputs(key, b=2, side=8, l=6, channels=4):
    x, t, context, pooled = jax.random.split(key, 4)
    return (
        jax.random.normal(x, (b, side, side, channels)),
        jax.random.uniform(t, (b,)),
        jax.random.normal(context, (b, l, 12)),
        jax.random.normal(pooled, (b, 10)),
    )


def noised(params, key):
    """Weights of which none is zero, as after training."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    some = [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(treedef, some)


def made(key, **options):
    model = MMDiT(**SMALL | dict(dtype=jnp.float32, remat="none") | options)
    args = inputs(key)
    params = tree.unbox(jax.jit(model.init)(key, *args)["params"])
    return model, noised(params, key), args


@pytest.mark.parametrize(
    "depth, options, count",
    [
        (15, dict(qk_norm=False), 496_066_624),
        (18, dict(qk_norm=False), 856_159_552),
        (21, dict(qk_norm=False), 1_358_950_720),
        (24, dict(qk_norm=False), 2_028_328_000),
        (30, dict(qk_norm=False), 3_962_392_384),
        (24, dict(qk_norm=True, dual_blocks=13, pos_size=384), 2_243_171_520),
        (38, dict(qk_norm=True), 8_056_627_520),
    ],
)
def test_published_sizes_have_the_published_parameters(depth, options, count):
    model = MMDiT(depth=depth, width=64 * depth, num_heads=depth, **options)
    shapes = (1, 16, 16, 16), (1,), (1, 154, 4096), (1, 2048)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_a_new_block_is_the_identity(key):
    block = Block(width=32, num_heads=2, dual=True, dtype=jnp.float32)
    x, text, c = (jax.random.normal(key, s) for s in [(2, 16, 32), (2, 6, 32), (2, 32)])
    run = lambda block, xs, c: block(xs, block.modulations(c))
    out, params = block.init_with_output(key, (x, text), c, method=run)
    chex.assert_trees_all_equal(out, (x, text))
    moved = noised(tree.unbox(params), key)
    assert not np.allclose(
        block.apply(moved, (x, text), c, method=run)[0], x, atol=1e-2
    )


SAME = [dict(unroll=2), *(dict(remat=x) for x in REMAT if x != "offload")]


@pytest.mark.parametrize("options", SAME)
def test_remat_and_unrolling_change_nothing(key, options):
    model, params, args = made(key, dual_blocks=1)
    other = made(key, dual_blocks=1, **options)[0]
    loss = lambda m: lambda p: jnp.sum(m.apply({"params": p}, *args) ** 2)
    ours, theirs = (
        jax.jit(jax.value_and_grad(loss(m)))(params) for m in (model, other)
    )
    chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("remat, again", [("mlp", 0), ("attention", 4), ("full", 12)])
def test_what_remat_runs_again(key, remat, again):
    """In units of d^2 for each token: of a block's linear maps fc1 is 4 of 12."""
    width, side, words = 128, 8, 32
    sizes = dict(depth=3, width=width, num_heads=1, channels=4, pos_size=8, pos_base=4)
    args = inputs(key, side=side, l=words)

    def count(remat):
        model = MMDiT(**sizes, dtype=jnp.float32, remat=remat)
        params = jax.eval_shape(model.init, key, *args)
        loss = lambda p: jnp.sum(model.apply(p, *args) ** 2)
        compiled = jax.jit(jax.grad(loss)).lower(tree.unbox(params)).compile()
        return compiled.cost_analysis()["flops"]

    tokens = 2 * ((side // 2) ** 2 + words)  # the loop's body is counted once
    extra = (count(remat) - count("none")) / (2 * width**2 * tokens)
    assert extra == pytest.approx(again, abs=1.2)


def test_text_ends_in_the_last_block(key):
    _, params, _ = made(key)
    assert set(params["last_block"]["text"]) == {"adaln", "attn"}
    assert set(params["last_block"]["text"]["attn"]) == {"to_qkv", "norm_q", "norm_k"}
    chex.assert_shape(
        params["last_block"]["text"]["adaln"]["linear"]["kernel"], (32, 2, 32)
    )


def test_a_third_weight_set_takes_the_later_text(key):
    model, params, args = made(key, weight_sets=3, text_split=2)
    out = model.apply({"params": params}, *args)
    chex.assert_equal_shape([out, args[0]])
    same = jax.tree.map(jnp.array, params)
    for name in ("blocks", "last_block"):
        same[name]["text2"] = same[name]["text"]
    two = made(key)[0]
    fewer = {k: v for k, v in same.items() if k not in ("blocks", "last_block")}
    for name in ("blocks", "last_block"):
        fewer[name] = {k: v for k, v in same[name].items() if k != "text2"}
    tied = model.apply({"params": same}, *args)
    chex.assert_trees_all_close(
        tied, two.apply({"params": fewer}, *args), rtol=1e-4, atol=1e-4
    )
    assert not np.allclose(out, tied, atol=1e-3)


def test_every_input_is_used(key):
    model, params, args = made(key)
    out = lambda *a: model.apply({"params": params}, *a)
    base = out(*args)
    for i in range(len(args)):
        moved = [a + 0.3 if j == i else a for j, a in enumerate(args)]
        assert not np.allclose(out(*moved), base, atol=1e-3)


def test_positions_follow_the_released_table():
    """Token i of the 192 table of SD3-medium is at (i - 64) / 4; columns come first."""
    table = np.asarray(positions(4, 6, 16, size=192, base=64)).reshape(4, 6, 16)
    x, y = ((np.arange(n) + (192 - n) // 2 - 64) / 4 for n in (6, 4))
    frequency = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(
        table[1, :, :4], np.sin(x[:, None] * frequency), atol=1e-6
    )
    np.testing.assert_allclose(
        table[1, :, 4:8], np.cos(x[:, None] * frequency), atol=1e-6
    )
    np.testing.assert_allclose(
        table[:, 2, 8:12], np.sin(y[:, None] * frequency), atol=1e-6
    )


def test_a_crop_is_the_centre_of_a_larger_one():
    whole = positions(8, 8, 16, size=8, base=4).reshape(8, 8, 16)
    crop = positions(4, 6, 16, size=8, base=4).reshape(4, 6, 16)
    chex.assert_trees_all_equal(whole[2:6, 1:7], crop)


def test_a_stored_table_replaces_the_formula(key):
    model, params, args = made(key)
    table = positions(8, 8, 32, size=8, base=4)[None]
    given = lambda t: model.apply(
        {"params": params, "buffers": {"pos_embed": t}}, *args
    )
    chex.assert_trees_all_equal(given(table), model.apply({"params": params}, *args))
    assert not np.allclose(given(2 * table), given(table), atol=1e-3)


def test_a_picture_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match="9x2 tokens do not fit a table of 8x8"):
        positions(9, 2, 16, size=8, base=4)


def test_patches_are_rows_of_p_q_c(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    patches = patchify(x, 2)
    chex.assert_trees_all_equal(
        patches[0, 1, 3:6], x[0, 0, 3]
    )  # p=0, q=1 of the second
    chex.assert_trees_all_equal(unpatchify(patches, 2, 4, 6), x)


@pytest.mark.parametrize(
    "depth, dual, side, text, tera",
    [(24, 0, 32, 154, 0.579), (24, 0, 128, 154, 8.437), (38, 0, 64, 333, 7.978)]
    + [(24, 13, 128, 333, 11.25)],
)
def test_flops_are_the_analytic_count(depth, dual, side, text, tera):
    model = MMDiT(depth=depth, width=64 * depth, num_heads=depth, dual_blocks=dual)
    count = model.flops(height=side, width=side, text=text, text_dim=4096)
    assert abs(count / 1e12 / tera - 1) < 2e-3


def test_positions_anywhere_on_the_table(key):
    whole = position_table.positions(8, 8, 32, size=8, base=4).reshape(8, 8, 32)
    place = jnp.array([[0, 0], [5, 2], [2, 3]])
    found = position_table.positions(3, 2, 32, size=8, base=4, place=place)
    stored = position_table.crop(whole.reshape(1, 64, 32), 3, 2, place)
    for at, one, other in zip(np.array(place), found, stored):
        part = whole[at[0] : at[0] + 3, at[1] : at[1] + 2].reshape(6, 32)
        chex.assert_trees_all_close(one, part, atol=1e-6)
        chex.assert_trees_all_equal(other, part)
    centre = position_table.positions(3, 2, 32, size=8, base=4)
    again = position_table.positions(
        3, 2, 32, size=8, base=4, place=jnp.array([[2, 3]])
    )
    chex.assert_trees_all_close(again[0], centre, atol=1e-6)


@pytest.mark.parametrize("side", [256, 512, 1024])
def test_the_papers_table(side):
    """((p - (h_max - s) / 2) * 256 / S) for p = 0 .. h_max - 1 (sec. 5.3.2)."""
    s, most = side // 16, 192
    places = (np.arange(most) - (most - s) / 2) * 256 / side
    frequency = 10000.0 ** -(np.arange(8) / 8)
    angle = places[:, None] * frequency
    rows = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    found = position_table.positions(most, 2, 32, size=most, base=s).reshape(
        most, 2, 32
    )
    chex.assert_trees_all_close(found[:, 0, 16:], rows.astype(np.float32), atol=1e-5)


def test_random_places_lie_on_the_table_and_reach_its_ends(key):
    model = MMDiT(**SMALL)
    place = np.array(model.random_place(key, (400, 8, 10, 4)))
    assert place.shape == (400, 2) and place.min() == 0
    assert place.max(0).tolist() == [4, 3]  # 4 x 5 tokens on a table of 8 x 8
