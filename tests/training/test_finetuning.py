"""Preferences and fine-tuning: their losses, and what trains beside what does not."""

import math
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.config.command_line import load
from sd3_jax.data import record_header
from sd3_jax.diffusion.paths import RF, expand
from sd3_jax.diffusion.timesteps import Uniform
from sd3_jax.training import finetuning, objectives
from sd3_jax.training.dpo import alternate, preference_loss

OPTIONS = dict(density=Uniform(), path=RF, beta=4.0)


def answer(scale):
    return lambda xt, t: scale * xt + 0.1 * expand(t, xt)


@pytest.fixture
def pair(key):
    return jax.random.normal(jax.random.fold_in(key, 7), (2, 16, 5))


@pytest.mark.parametrize("weight", ["constant", "(1-t)^2"])
def test_the_loss_is_the_formula(weight, key, pair):
    value, metrics = preference_loss(
        key, answer(0.3), answer(0.5), *pair, weight=weight, **OPTIONS
    )
    t_key, noise_key = jax.random.split(key)
    t = Uniform().sample(t_key, (16,))
    noise = jax.random.normal(noise_key, (16, 5))

    def m(x):
        xt = (1 - t[:, None]) * x + t[:, None] * noise
        error = lambda of: jnp.mean((of(xt, t) - (noise - x)) ** 2, axis=1)
        return error(answer(0.3)) - error(answer(0.5))

    w = 1.0 if weight == "constant" else (1 - t) ** 2
    margin = -(4.0 / 2) * w * (m(pair[0]) - m(pair[1]))
    chex.assert_trees_all_close(
        value, -jnp.log(jax.nn.sigmoid(margin)).mean(), rtol=1e-5
    )
    chex.assert_trees_all_close(metrics["margin"], margin.mean(), rtol=1e-4)
    assert metrics["accuracy"] == (margin > 0).mean()


def test_it_starts_at_ln_2_and_falls_towards_the_chosen(key, pair):
    loss = lambda s: preference_loss(key, answer(s), answer(0.5), *pair, **OPTIONS)[0]
    assert float(loss(0.5)) == pytest.approx(math.log(2), abs=3e-7)
    same = preference_loss(key, answer(0.5), answer(0.5), *pair[::-1], **OPTIONS)[0]
    assert float(same) == pytest.approx(math.log(2), abs=3e-7)
    # What is right of the chosen pictures alone is preferred to what is of neither.
    known = lambda which: lambda xt, t: (xt - alternate(which, which)) / expand(t, xt)
    better = preference_loss(key, known(pair[0]), answer(0.0), *pair, **OPTIONS)
    worse = preference_loss(key, known(pair[1]), answer(0.0), *pair, **OPTIONS)
    assert better[0] < math.log(2) < worse[0]
    assert better[1]["accuracy"] > 0.8 and worse[1]["accuracy"] < 0.2


def test_the_reference_has_no_gradient(key, pair):
    of = lambda r: preference_loss(key, answer(0.3), answer(r), *pair, **OPTIONS)[0]
    assert jax.grad(of)(0.5) == 0


@pytest.fixture(scope="module")
def model():
    config = load("configs/quickstart.py:tiny")
    made = model_parts.build_parts(config)
    init = jax.jit(lambda key: tree.unbox(made.objective.init(key)))
    params = init(jax.random.key(0))
    off = lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    ids = np.arange(8 * config.text.length).reshape(8, -1) % 60 + 1
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 8, 3), np.uint8)
    batch = {"image": jnp.array(image[0]), "ids_bytes": jnp.array(ids, jnp.int32)}
    return made.objective, jax.tree.map(off, params), batch, jnp.array(image[1])


def low_rank(objective):
    return finetuning.low_rank(objective, rank=2, alpha=0.0, targets="")


def full(objective):
    return finetuning.full(objective, text=True, reference=True)


@pytest.mark.parametrize("make", [low_rank, full])
def test_what_trains_is_at_first_the_base(make, model, key):
    objective, base, batch, worse = model
    tuned = make(objective)
    params = tree.unbox(tuned.start(key, base))
    frozen = tuned.frozen_part(base)
    cond = objective.encode(base, batch)
    x = jax.random.normal(key, (8, 8, 8, 3))
    run = lambda params: objective.velocity(params)(x, jnp.full(8, 0.5), cond)
    np.testing.assert_array_equal(run(tuned.full_params(params, frozen)), run(base))
    own = tuned.loss(params, key, batch, frozen)[0]
    assert own == objective.loss(base, key, batch, {})[0]
    dpo = finetuning.preferring(tuned, objective, beta=500.0, weight="constant")
    pairs = batch | {"rejected_image": worse}
    (value, metrics), grads = jax.value_and_grad(dpo.loss, has_aux=True)(
        params, key, pairs, frozen
    )
    assert float(value) == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["chosen_error"] != metrics["rejected_error"]
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)
    after, metrics = dpo.loss(moved, key, pairs, frozen)
    assert after < value and metrics["margin"] > 0


def test_only_the_low_rank_has_a_gradient_and_an_optimizers_state(model, key):
    objective, base, batch, _ = model
    tuned = low_rank(objective)
    params = tree.unbox(tuned.init(key))
    assert set(params) == {"denoiser"}
    assert tree.count(params) < tree.count(base["denoiser"]) / 2
    grads = jax.grad(lambda p: tuned.loss(p, key, batch, base)[0])(params)
    names = {
        tree.names(path)[-1] for path, _ in jax.tree_util.tree_leaves_with_path(grads)
    }
    assert names == {"a", "b"}
    size = lambda name: sum(
        float(jnp.abs(x).sum())
        for path, x in jax.tree_util.tree_leaves_with_path(grads)
        if tree.names(path)[-1] == name
    )
    assert size("a") == 0 and size("b") > 0  # b is zero


def test_text_may_stay_as_it_is(model, key):
    objective, base, batch, _ = model
    tuned = finetuning.full(objective, text=False, reference=False)
    assert set(tuned.start(key, base)) == {"denoiser"}
    assert set(tuned.frozen_part(base)) == {"text"}
    whole = tuned.full_params(tuned.start(key, base), tuned.frozen_part(base))
    chex.assert_trees_all_equal(whole, base)


def test_prior_preservation_weighs_the_two_sets(model, key):
    objective, base, batch, _ = model
    sets = np.array([0, 1, 0, 1, 1, 0, 0, 0], np.int32)
    tuned = finetuning.preserving(
        finetuning.plain(objective), objective, weight=0.3, last=1
    )
    value, metrics = tuned.loss(base, key, batch | {"set": sets}, {})
    errors = objective.errors(base, key, batch)
    chex.assert_trees_all_close(
        metrics["instance"], errors[sets == 0].mean(), rtol=1e-6
    )
    chex.assert_trees_all_close(metrics["prior"], errors[sets == 1].mean(), rtol=1e-6)
    chex.assert_trees_all_close(value, metrics["instance"] + 0.3 * metrics["prior"])


@pytest.mark.parametrize(
    "sets, parts", [([0, 1, 0, 1, 1, 0, 0, 0], 4), ([0, 0, 1, 0], 2), ([0], 1)]
)
def test_a_sets_mean_is_that_of_the_whole_batch_however_it_is_cut(sets, parts):
    """Parts of a batch that is accumulated may lack a set."""
    sets, error = np.array(sets), np.arange(1.0, 1 + len(sets), dtype=np.float32)
    fake = SimpleNamespace(errors=lambda params, key, batch: batch["error"])
    plain = finetuning.plain(SimpleNamespace(init=None, loss=None))
    tuned = finetuning.preserving(plain, fake, weight=0.3, last=1)
    batch = tuned.prepare_batch({"set": jnp.array(sets), "error": jnp.array(error)})
    rows = [{k: x[i::parts] for k, x in batch.items()} for i in range(parts)]
    losses, metrics = zip(*(tuned.loss({}, None, part, {}) for part in rows))
    mean = lambda mine: error[mine].mean() if mine.any() else 0.0
    wanted = mean(sets == 0), mean(sets == 1)
    assert np.mean(losses) == pytest.approx(wanted[0] + 0.3 * wanted[1], rel=1e-6)
    for number, (name, value) in enumerate(zip(finetuning.SETS, wanted)):
        value = value if (sets == number).any() else math.nan
        logged = np.mean([part[name] for part in metrics])
        assert logged == pytest.approx(value, rel=1e-6, nan_ok=True)


def test_a_preferences_names_are_those_of_records():
    assert objectives.REJECTED == record_header.REJECTED
    better, worse = objectives.parted({"image": 1, "rejected_image": 2, "pooled": 3})
    assert better == {"image": 1, "pooled": 3} and worse == {"image": 2}
