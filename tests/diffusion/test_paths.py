import chex
import jax
import jax.numpy as jnp
import pytest

from sd3_jax.diffusion.paths import RF, Path


@pytest.fixture
def path():
    return RF


@pytest.fixture
def pair(key):
    return jax.random.normal(key, (2, 5, 4, 4, 3))  # x0 and noise, b = 5


def test_is_data_at_0_and_noise_at_1(path, pair):
    assert isinstance(path, Path)
    zeros = jnp.zeros(5)
    chex.assert_trees_all_equal(path.interpolate(*pair, zeros), pair[0])
    chex.assert_trees_all_equal(path.interpolate(*pair, zeros + 1), pair[1])


def test_velocity_is_the_time_derivative(path, pair):
    t = jnp.linspace(0.1, 0.9, 5)
    interpolate = lambda t: path.interpolate(*pair, t)
    _, slope = jax.jvp(interpolate, (t,), (jnp.ones(5),))
    chex.assert_trees_all_close(path.velocity(*pair, t), slope, atol=1e-6)


def test_velocity_gives_x0_and_noise_back(path, pair):
    t = jnp.linspace(0, 1, 5)
    xt, v = path.interpolate(*pair, t), path.velocity(*pair, t)
    chex.assert_trees_all_close(path.x0(xt, v, t), pair[0], atol=1e-6)
    chex.assert_trees_all_close(path.noise(xt, v, t), pair[1], atol=1e-6)


def test_coefficients_are_those_of_the_interpolation(path):
    t, one, zero = jnp.linspace(0, 1, 5), jnp.ones((5, 2)), jnp.zeros((5, 2))
    a, b = path.coefficients(t)
    chex.assert_trees_all_close(path.interpolate(one, zero, t), one * a[:, None])
    chex.assert_trees_all_close(path.interpolate(zero, one, t), one * b[:, None])


def test_t_keeps_bfloat16_data_in_float32(path):
    x = jnp.ones((3, 2), jnp.bfloat16)
    assert path.interpolate(x, x, jnp.ones(3)).dtype == jnp.float32
