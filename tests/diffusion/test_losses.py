import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.diffusion.losses import flow_loss, loss_at
from sd3_jax.diffusion.paths import RF
from sd3_jax.diffusion.timesteps import LogitNormal

OPTIONS = dict(density=LogitNormal(), path=RF)


@pytest.fixture
def x0():
    # Not from fold_in(key, 1): that is split(key)[1], which draws the noise.
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def true_velocity(x0):
    """Known x0: v = noise - x0 = (xt - x0) / t."""
    return lambda xt, t: (xt - x0) / t[:, None, None, None]


def test_true_velocity_has_zero_loss(key, x0):
    loss, aux = flow_loss(key, true_velocity(x0), x0, **OPTIONS)
    chex.assert_trees_all_close(loss, 0.0, atol=1e-9)
    chex.assert_shape((aux["t"], aux["error"]), (4,))
    wrong, _ = flow_loss(key, lambda xt, t: -true_velocity(x0)(xt, t), x0, **OPTIONS)
    assert wrong > 1


def test_zero_velocity_costs_the_variances(key):
    x0 = 3.0 * jnp.ones((64, 16, 16, 4))
    loss, _ = flow_loss(key, lambda xt, t: 0 * xt, x0, **OPTIONS)
    chex.assert_trees_all_close(loss, 9.0 + 1.0, rtol=1e-2)  # E |noise - x0|^2


def test_error_is_that_of_each_example(key, x0):
    off = jnp.array([0.0, 1.0, 2.0, 3.0])
    velocity = lambda xt, t: true_velocity(x0)(xt, t) + off[:, None, None, None]
    loss, aux = flow_loss(key, velocity, x0, **OPTIONS)
    chex.assert_trees_all_close(aux["error"], off**2, atol=1e-4)
    chex.assert_trees_all_close(loss, jnp.mean(off**2), rtol=1e-4)


def test_gradient_points_from_the_prediction_to_the_target(key, x0):
    loss = lambda c: flow_loss(key, lambda xt, t: c + 0 * xt, x0, **OPTIONS)[0]
    target = -jax.grad(loss)(0.0) / 2  # d/dc mean (c - v)^2 = 2 (c - mean v)
    chex.assert_trees_all_close(jax.grad(loss)(target), 0.0, atol=1e-6)
    assert loss(target) < loss(target + 0.1) and loss(target) < loss(target - 0.1)


def test_flow_loss_draws_t_from_the_density(key):
    x0 = jnp.zeros((5000, 1))
    _, aux = flow_loss(key, lambda xt, t: xt, x0, density=LogitNormal(2.0), path=RF)
    logit = jnp.log(aux["t"] / (1 - aux["t"]))
    chex.assert_trees_all_close((logit.mean(), logit.std()), (2.0, 1.0), atol=0.05)


def test_noise_and_t_are_independent(key):
    x0 = jnp.zeros((5000, 1))
    velocity = lambda xt, t: jnp.zeros_like(xt)
    _, aux = flow_loss(key, velocity, x0, **OPTIONS)  # its error is noise^2
    drawn = jax.scipy.special.logit(aux["t"]) ** 2
    assert abs(np.corrcoef(drawn, aux["error"])[0, 1]) < 0.05


def test_loss_at_uses_the_given_t(key, x0):
    t = jnp.array([0.0, 0.25, 0.5, 1.0])
    seen = []

    def velocity(xt, t):
        seen.append((xt, t))
        return xt

    _, aux = loss_at(key, velocity, x0, t, path=RF)
    chex.assert_trees_all_equal(aux["t"], seen[0][1], t)
    chex.assert_trees_all_equal(seen[0][0][0], x0[0])  # data at t = 0


def test_examples_of_weight_0_do_not_count(key, x0):
    weight = jnp.array([1.0, 0.0, 1.0, 0.0])
    run = lambda x0, **kw: flow_loss(key, lambda xt, t: xt, x0, **kw, **OPTIONS)
    loss, aux = run(x0, weight=weight)
    chex.assert_trees_all_close(loss, aux["error"][::2].mean(), rtol=1e-6)
    chex.assert_trees_all_close(loss, run(x0.at[1::2].set(1e3), weight=weight)[0])
    chex.assert_trees_all_close(run(x0)[0], run(x0, weight=jnp.ones(4))[0])


def test_a_batch_without_weight_costs_0(key, x0):
    def loss(c):
        velocity = lambda xt, t: c * xt
        return flow_loss(key, velocity, x0, weight=jnp.zeros(4), **OPTIONS)[0]

    chex.assert_trees_all_equal(jax.value_and_grad(loss)(1.0), (0.0, 0.0))


def test_bfloat16_latents_and_networks_are_compared_in_float32(key, x0):
    velocity = lambda xt, t: xt.astype(jnp.bfloat16)
    loss, aux = flow_loss(key, velocity, x0.astype(jnp.bfloat16), **OPTIONS)
    chex.assert_type((loss, aux["error"], aux["t"]), jnp.float32)


def test_does_not_depend_on_the_sharding(key):
    x0 = jax.random.normal(key, (16, 4, 4, 2))
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.device_put(x0, jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(lambda x0: flow_loss(key, lambda xt, t: xt, x0, **OPTIONS))
    chex.assert_trees_all_close(*map(jax.device_get, (run(x0), run(split))), rtol=1e-6)
