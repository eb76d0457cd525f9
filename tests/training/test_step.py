"""The step and the optimizer: accumulation, averaging, decay, warm-up, Muon."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd3_jax.training import optimizer
from sd3_jax.training.ema import moving_average
from sd3_jax.training.state import init_state
from sd3_jax.training.step import make_train_step

OPTIM = dict(
    name="adamw", lr=1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0, clip=1.0,
    schedule="constant", warmup=0, muon_lr=0.02, steps=100,
)  # fmt: skip


def linear_loss(params, key, batch, frozen):
    error = batch["x"] @ params["w"]["kernel"] - batch["y"]
    return jnp.mean(error**2), {"mean": error.mean()}


def problem(key):
    x = jax.random.normal(key, (8, 3))
    batch = {"x": x, "y": x @ jnp.array([[1.0], [2.0], [3.0]])}
    return lambda _: {"w": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)}}, batch


def run(key, steps=1, **options):
    init, batch = problem(key)
    tx, _ = optimizer.make(**OPTIM | options.pop("optim", {}))
    step = jax.jit(make_train_step(linear_loss, tx, ema_decay=0.9, **options))
    state = init_state(key, init, tx)
    for _ in range(steps):
        state, metrics = step(state, key, batch, {})
    return state, metrics


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_whole_batch(key, accumulate):
    whole, parts = run(key), run(key, accumulate=accumulate)
    chex.assert_trees_all_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_training_goes_down(key):
    assert run(key, 300)[1]["loss"] < 1e-2 * run(key, 1)[1]["loss"]


def test_a_step_draws_from_its_own_number(key):
    seen = []

    def loss(params, key, batch, frozen):
        return jnp.sum(params["w"] ** 2), {"drawn": jax.random.uniform(key)}

    tx = optax.sgd(0.1)
    step = make_train_step(loss, tx, ema_decay=0.9)
    state = init_state(key, lambda _: {"w": jnp.ones(2)}, tx)
    for _ in range(3):
        state, metrics = step(state, key, {}, {})
        seen.append(float(metrics["drawn"]))
    assert len(set(seen)) == 3
    again = step(state.replace(step=jnp.int32(1)), key, {}, {})[1]["drawn"]
    assert float(again) == seen[1]


def test_the_average_follows_and_then_lags():
    ema, one = {"w": jnp.zeros(1)}, {"w": jnp.ones(1)}
    after = moving_average(ema, one, jnp.int32(1), 0.99, 1)["w"]
    np.testing.assert_allclose(after, 1 - 2 / 11, rtol=1e-6)  # warming up
    late = moving_average(ema, one, jnp.int32(10_000), 0.99, 1)["w"]
    np.testing.assert_allclose(late, 0.01, rtol=1e-4)
    early = moving_average(ema, one, jnp.int32(40), 0.99, 100)["w"]  # of a short run
    np.testing.assert_allclose(early, 9 / 50, rtol=1e-6)
    between = moving_average(ema, one, jnp.int32(10_050), 0.99, 100)["w"]
    np.testing.assert_array_equal(between, 0.0)  # only every hundredth step


def test_between_its_turns_the_average_stays_where_it_is():
    """All of the state is donated, and no leaf of it is copied on the way round."""
    side, key = 97, jax.random.key(0)
    init = lambda _: {"w": {"kernel": jnp.ones((side, side))}}
    loss = lambda params, key, batch, frozen: ((params["w"]["kernel"] ** 2).sum(), {})
    tx, _ = optimizer.make(**OPTIM)
    step = make_train_step(loss, tx, ema_decay=0.9, ema_every=100)
    state = jax.eval_shape(lambda: init_state(key, init, tx))
    program = jax.jit(step, donate_argnums=0).lower(state, key, {}, {}).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert program.memory_analysis().alias_size_in_bytes >= size
    assert not re.search(rf"f32\[{side},{side}\]\S* copy\(", program.as_text())


@pytest.mark.parametrize(
    "schedule, last", [("constant", 1), ("cosine", 0.02), ("linear", 0.02)]
)
def test_the_rate_warms_up_and_decays(schedule, last):
    _, rate = optimizer.make(**OPTIM | dict(schedule=schedule, warmup=10))
    np.testing.assert_allclose([rate(0), rate(5), rate(10)], [0, 5e-3, 1e-2], atol=1e-8)
    np.testing.assert_allclose(rate(100), 1e-2 * last, rtol=1e-5)


def test_gradients_are_clipped_by_their_global_norm():
    tx, _ = optimizer.make(**OPTIM | dict(clip=1.0))
    params = {"kernel": jnp.zeros((4, 4))}
    states = [
        tx.update({"kernel": jnp.full((4, 4), s)}, tx.init(params), params)[1]
        for s in (100.0, 1000.0)
    ]
    chex.assert_trees_all_close(*states, rtol=1e-5)  # both are cut to the same gradient


def test_muon_makes_a_stacked_blocks_updates_orthogonal(key):
    shape = {
        "blocks": {
            "image": {
                "attn": {
                    "to_qkv": {"kernel": (2, 16, 3, 2, 8)},
                    "to_out": {"kernel": (2, 2, 8, 16)},
                },
                "mlp": {"fc1": {"kernel": (2, 16, 64)}},
            }
        },
        "patch_embed": {"kernel": (12, 16)},
    }
    leaf = lambda x: isinstance(x, tuple)
    params = jax.tree.map(lambda s: jnp.zeros(s), shape, is_leaf=leaf)
    grads = jax.tree.map(lambda s: jax.random.normal(key, s), shape, is_leaf=leaf)
    tx, _ = optimizer.make(**OPTIM | dict(name="muon", clip=float("inf")))
    updates, _ = tx.update(grads, tx.init(params), params)
    attn = updates["blocks"]["image"]["attn"]
    q = attn["to_qkv"]["kernel"][1, :, 0].reshape(16, 16)
    out = attn["to_out"]["kernel"][0].reshape(16, 16)
    fc1 = updates["blocks"]["image"]["mlp"]["fc1"]["kernel"][1]
    for matrix in (q, out, fc1):
        s = jnp.linalg.svd(matrix, compute_uv=False)
        assert s.max() / s.min() < 6  # of the gradient's the ratio is far larger
    adam = jnp.abs(updates["patch_embed"]["kernel"])
    np.testing.assert_allclose(adam, adam[0, 0], rtol=1e-3)  # Adam's first step


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf, 1e30])  # 1e30 squared is inf
def test_a_step_that_is_not_finite_changes_nothing(key, poison, accumulate):
    init, batch = problem(key)
    tx, _ = optimizer.make(**OPTIM)
    made = make_train_step(linear_loss, tx, ema_decay=0.9, accumulate=accumulate)
    step = jax.jit(made)
    before, _ = step(init_state(key, init, tx), key, batch, {})
    bad = batch | {"x": batch["x"].at[3, 1].set(poison)}
    after, metrics = step(before, key, bad, {})
    assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"])
    assert after.step == before.step + 1  # the next draws other noise
    chex.assert_trees_all_equal(after.replace(step=before.step), before)
    again, metrics = step(after, key, batch, {})
    assert np.isfinite(metrics["loss"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(again))


def test_a_gradient_that_is_not_finite_counts_too(key):
    def loss(params, key, batch, frozen):
        return jnp.sum(jnp.sqrt(params["w"])), {}  # 0, whose derivative is infinite

    tx = optax.adam(0.1)
    state = init_state(key, lambda _: {"w": jnp.zeros(2)}, tx)
    after, metrics = make_train_step(loss, tx, ema_decay=0.9)(state, key, {}, {})
    assert metrics["loss"] == 0 and np.isinf(metrics["grad_norm"])
    chex.assert_trees_all_equal(after.replace(step=0), state.replace(step=0))
