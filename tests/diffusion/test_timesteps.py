import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest

from sd3_jax.diffusion.timesteps import (
    DENSITIES,
    CosMap,
    Linear,
    LogitNormal,
    Mode,
    Shifted,
    Uniform,
    make,
    resolution_shift,
    shift,
)

DEFAULTS = dict(mean=0.0, std=1.0, mode_scale=1.29, shift=1.0)
CASES = [
    Uniform(),
    LogitNormal(),
    LogitNormal(-0.5, 0.6),
    LogitNormal(1.0, 2.2),
    Mode(),
    Mode(0.0),
    Mode(-0.5),
    CosMap(),
    Linear(),
    Shifted(Uniform(), 3.0),
    Shifted(LogitNormal(0.5, 0.6), 3.0),
    Shifted(Mode(), 0.5),
    Shifted(CosMap(), 2.0),
]
each = pytest.mark.parametrize("density", CASES, ids=str)


@pytest.fixture(scope="module")
def integrate():
    """Edges and the midpoint rule's integral of a pdf up to each of them."""
    n = 100_000
    edges = np.linspace(0, 1, n + 1)
    middles = jnp.asarray((edges[1:] + edges[:-1]) / 2, jnp.float32)

    def integrate(density):
        mass = np.asarray(density.pdf(middles), np.float64) / n
        return edges, np.append(0, np.cumsum(mass))

    return integrate


@each
def test_pdf_integrates_to_the_cdf_and_to_1(density, integrate):
    edges, mass = integrate(density)
    assert abs(mass[-1] - 1) < 2e-4
    cdf = density.cdf(jnp.asarray(edges, jnp.float32))
    np.testing.assert_allclose(cdf, mass, atol=2e-4)


@each
def test_samples_follow_the_pdf(density, integrate, key):
    t = np.asarray(density.sample(key, (20_000,)))
    edges, mass = integrate(density)
    assert kstest(t, lambda t: np.interp(t, edges, mass)).pvalue > 1e-3


EXTREMES = [
    LogitNormal(40.0, 1.0),
    LogitNormal(-200.0, 1.0),
    LogitNormal(0.0, 50.0),
    Shifted(LogitNormal(12.0, 1.0), 1e4),
    Shifted(Mode(-1.0), 1e-4),
    Mode(2 / (math.pi - 2)),
    CosMap(),
    Uniform(),
]


@pytest.mark.parametrize("density", EXTREMES, ids=str)
def test_samples_stay_inside_in_float32(density, key):
    t = density.sample(key, (100_000,))
    assert t.dtype == jnp.float32
    assert 0 < t.min() and t.max() < 1
    chex.assert_tree_all_finite((jnp.log(t), jnp.log1p(-t), 1 / (1 - t)))


@each
def test_pdf_is_finite_at_the_ends(density):
    p = density.pdf(jnp.array([0.0, 1.0]))
    chex.assert_tree_all_finite(p)
    assert (p >= 0).all()


def test_logit_normal_vanishes_at_the_ends_and_mode_does_not():
    ends = jnp.array([0.0, 1.0])
    chex.assert_trees_all_close(LogitNormal().pdf(ends), jnp.zeros(2), atol=1e-12)
    at_ends = 1 / (1 + 1.29)  # 1 / |f'(0)|
    chex.assert_trees_all_close(Mode().pdf(ends), jnp.full(2, at_ends), rtol=1e-4)


def test_extreme_modes_have_a_positive_pdf():
    t = jnp.linspace(0, 1, 1001)
    for scale in (-1.0, 2 / (math.pi - 2)):
        assert (Mode(scale).pdf(t) > 0).all()


def test_a_shifted_logit_normal_is_one_of_larger_mean(key):
    a, b = Shifted(LogitNormal(), 3.0), LogitNormal(math.log(3.0), 1.0)
    t = jnp.linspace(0.001, 0.999, 999)
    chex.assert_trees_all_close(a.pdf(t), b.pdf(t), rtol=1e-3)
    draws = a.sample(key, (1000,)), b.sample(key, (1000,))
    chex.assert_trees_all_close(*draws, atol=1e-6)


def test_mode_0_is_uniform(key):
    t = jnp.linspace(0, 1, 101)
    chex.assert_trees_all_close(Mode(0.0).pdf(t), jnp.ones(101))
    u = Uniform().sample(key, (1000,))
    chex.assert_trees_all_close(Mode(0.0).sample(key, (1000,)), 1 - u, atol=1e-7)


def test_shift_lowers_the_log_snr_by_twice_log_alpha():
    t = np.linspace(0.01, 0.99, 99)
    log_snr = lambda t: 2 * np.log((1 - t) / t)
    moved = log_snr(shift(t, 3.0)) - log_snr(t)
    np.testing.assert_allclose(moved, -2 * math.log(3))  # eq 25
    np.testing.assert_allclose(shift(shift(t, 3.0), 1 / 3.0), t)


def test_shift_keeps_the_uncertainty_of_a_constant_image():
    t, n, m = np.linspace(0.01, 0.99, 99), 16 * 16, 64 * 64
    sigma = lambda t, n: t / (1 - t) / np.sqrt(n)
    shifted = shift(t, resolution_shift(m, n))
    np.testing.assert_allclose(sigma(shifted, m), sigma(t, n))


def test_sampling_does_not_depend_on_the_sharding(key):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    sample = lambda key: Mode().sample(key, (64,))
    sharded = jax.jit(sample, out_shardings=sharding)(key)
    chex.assert_trees_all_equal(np.asarray(sharded), np.asarray(jax.jit(sample)(key)))


@pytest.mark.parametrize("name", DENSITIES)
def test_make_reaches_every_density(name, key):
    options = dict(mean=0.5, std=0.6, mode_scale=0.81, shift=3.0)
    plain = {
        "uniform": Uniform(),
        "logit_normal": LogitNormal(0.5, 0.6),
        "mode": Mode(0.81),
        "cosmap": CosMap(),
        "linear": Linear(),
    }
    assert make(name, **options) == Shifted(plain[name], 3.0)


@pytest.mark.parametrize(
    "name, field, given, want",
    [
        ("logit_normal", "std", 0.0, "a finite number > 0"),
        ("logit_normal", "std", math.inf, "a finite number > 0"),
        ("logit_normal", "mean", math.nan, "a finite number"),
        ("mode", "mode_scale", 1.76, "a number in \\[-1, 2 / \\(pi - 2\\) = 1.7519\\]"),
        ("mode", "mode_scale", -1.01, "a number in .*"),
        ("uniform", "shift", 0.0, "a finite number > 0"),
        ("uniform", "shift", math.nan, "a finite number > 0"),
    ],
)
def test_make_explains_a_bad_number(name, field, given, want):
    with pytest.raises(ValueError, match=f"^{field}: got {given}, expected {want}$"):
        make(name, **DEFAULTS | {field: given})


def test_make_explains_a_bad_name():
    message = (
        "^density: got 'lognorm', expected one of uniform, .*nearest: logit_normal"
    )
    with pytest.raises(ValueError, match=message):
        make("lognorm", **DEFAULTS)
