"""ComfyUI's published rules with the same noise, and the marginals of a Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion.test_multistep_solvers import MEAN, STD, velocity

from sd3_jax.diffusion import grids
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.diffusion.stochastic_solvers import STOCHASTIC

NOISE = np.random.default_rng(1).standard_normal((32, 8, 5)).astype(np.float32)


def euler_ancestral_rf(x, sigmas, i, denoised, _):
    """One step of sample_euler_ancestral_RF, eta = s_noise = 1."""
    down = sigmas[i + 1] * (1 + (sigmas[i + 1] / sigmas[i] - 1))
    alpha, alpha_down = 1 - sigmas[i + 1], 1 - down
    renoise = (sigmas[i + 1] ** 2 - down**2 * alpha**2 / alpha_down**2) ** 0.5
    ratio = down / sigmas[i]
    x = ratio * x + (1 - ratio) * denoised
    return alpha / alpha_down * x + NOISE[i] * renoise


def half_log_snr(sigma):
    return np.log((1 - sigma) / sigma)


def dpmpp_2m_sde(x, sigmas, i, denoised, old):
    """One step of sample_dpmpp_2m_sde, eta = s_noise = 1, midpoint."""
    before, start, end = half_log_snr(sigmas[[max(i - 1, 0), i, i + 1]])
    h = end - start
    h_eta = 2 * h
    alpha = sigmas[i + 1] * np.exp(end)
    x = sigmas[i + 1] / sigmas[i] * np.exp(-h) * x - alpha * np.expm1(-h_eta) * denoised
    if old:
        r = (start - before) / h
        x = x - 0.5 * alpha * np.expm1(-h_eta) * (1 / r) * (denoised - old[-1])
    return x + NOISE[i] * sigmas[i + 1] * (-np.expm1(-2 * h)) ** 0.5


def dpmpp_3m_sde(x, sigmas, i, denoised, old):
    """One step of sample_dpmpp_3m_sde, eta = s_noise = 1."""
    lambda_ = half_log_snr(sigmas[max(i - 2, 0) : i + 2])
    *before, h = np.diff(lambda_)
    h_eta, alpha = 2 * h, sigmas[i + 1] * np.exp(lambda_[-1])
    x = sigmas[i + 1] / sigmas[i] * np.exp(-h) * x - alpha * np.expm1(-h_eta) * denoised
    phi_2 = np.expm1(-h_eta) / h_eta + 1
    if len(old) > 1:
        r0, r1 = before[1] / h, before[0] / h
        d1_0, d1_1 = (denoised - old[-1]) / r0, (old[-1] - old[-2]) / r1
        d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
        d2 = (d1_0 - d1_1) / (r0 + r1)
        phi_3 = phi_2 / h_eta - 0.5
        x = x + alpha * phi_2 * d1 - alpha * phi_3 * d2
    elif old:
        x = x + alpha * phi_2 * (denoised - old[-1]) / (before[0] / h)
    return x + NOISE[i] * sigmas[i + 1] * (-np.expm1(-2 * h)) ** 0.5


RULES = {  # of comfy/k_diffusion/sampling.py
    "euler_ancestral": euler_ancestral_rf,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
}


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_with_the_same_noise_it_is_comfyuis(name, steps):
    # Below 1, where ComfyUI's log-SNR is finite.
    start, sigmas = NOISE[-1], np.float64(grids.flow(steps, 3.0))
    x, old = np.float64(start), []
    for i in range(steps):
        denoised = x - sigmas[i] * velocity(x, np.full(len(x), sigmas[i]))
        last = sigmas[i + 1] == 0
        x = denoised if last else RULES[name](x, sigmas, i, denoised, old)
        old.append(denoised)
    grid, draw = np.float32(sigmas), lambda i: jnp.asarray(NOISE)[i]
    ours = SOLVERS[name](velocity, jnp.array(start), grid, draw=draw)
    np.testing.assert_allclose(ours, x, atol=2e-5)


def moments(name, grid):
    """Mean and variance of the solver's result, exactly: it is affine in all noise.

    Row 0 has no noise at all, and each other row one number that is 1.
    """
    n = len(grid)
    start, *noises = jnp.eye(n + 1)[:, 1:, None]  # (n, 1) each, n - 1 of them drawn
    x = jnp.concatenate([jnp.zeros((1, 1)), start])
    draw = lambda i: jnp.concatenate([jnp.zeros((1, 1)), jnp.stack(noises)[i]])
    x = SOLVERS[name](velocity, x, grid, draw=draw)[:, 0]
    return float(x[0]), float(jnp.sum((x[1:] - x[0]) ** 2))


@pytest.mark.parametrize(
    "name, left, order",
    [
        ("euler_ancestral", 0.06, 0.7),
        ("dpmpp_2m_sde", 0.01, 1.2),
        ("dpmpp_3m_sde", 0.003, 1.8),
    ],
)
def test_the_distribution_tends_to_that_of_the_data(name, left, order):
    """N(MEAN, STD^2) in the limit of many steps, from pure noise."""
    counts, errors = [25, 50, 100, 200], []
    for steps in counts:
        mean, variance = moments(name, grids.linear(steps))
        assert abs(mean - MEAN) < 1e-5
        errors.append(abs(variance / STD**2 - 1))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    print(f"{name}: variance off by {errors}, order {slope:.2f}")
    assert errors[-1] < left and slope > order


@pytest.mark.parametrize("name", STOCHASTIC)
def test_samples_have_these_moments(name, key):
    """80,000 samples: the standard errors are 0.001 and 0.5 %."""
    start, noises = jax.random.split(key)
    draw = lambda i: jax.random.normal(jax.random.fold_in(noises, i), (20_000, 4))
    run = jax.jit(lambda x, grid: SOLVERS[name](velocity, x, grid, draw=draw))
    grid = grids.flow(20, 3.0)
    x = run(jax.random.normal(start, (20_000, 4)), grid)
    mean, variance = moments(name, grid)
    np.testing.assert_allclose(x.mean(), mean, atol=4e-3)
    np.testing.assert_allclose(x.var(), variance, rtol=0.02)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_pure_noise_is_a_start(name):
    """At t = 1 the log-SNR is infinite; the result is finite and close to t = 1 - e."""
    draw = lambda i: jnp.asarray(NOISE)[i]
    grid = grids.released(6, 3.0)
    run = lambda grid: SOLVERS[name](velocity, jnp.array(NOISE[-1]), grid, draw=draw)
    near = np.append(np.float32(1 - 1e-6), grid[1:])
    np.testing.assert_allclose(run(grid), run(near), atol=0.02)
