"""Orders of convergence, and the rules that ComfyUI publishes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd3_jax.diffusion import grids
from sd3_jax.diffusion.multistep_weights import MULTISTEP, phi
from sd3_jax.diffusion.solvers import SOLVERS

MEAN, STD = 0.7, 0.3
ORDERS = {
    "euler": 1,
    "heun": 2,
    "dpmpp_2m": 2,
    "dpmpp_2m_flow": 2,
    "dpmpp_3m_flow": 2,
    "unipc_2": 3,
    "unipc_3": 3,
    "deis_2": 2,
    "deis_3": 3,
    "res_2m": 2,
}
COUNTS = [12, 16, 24, 32]


def velocity(x, t):
    """Of data N(MEAN, STD^2)."""
    t = t[:, None]
    variance = ((1 - t) * STD) ** 2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def solution(x, start, end):
    """Where the velocity takes x from one t to another, in float64."""
    width = lambda t: np.hypot((1 - t) * STD, t)
    return (1 - end) * MEAN + width(end) / width(start) * (x - (1 - start) * MEAN)


def grid_of(n):
    """Even in log-SNR from -2 to 1, and three more steps.

    Two short steps come first, since a multistep solver's first steps are of low order,
    and its last ones too.
    """
    h, short = 3 / n, (3 / n) ** 2 / 4
    lambda_ = [-2, -2 + short, *np.linspace(-2 + 2 * short, 1, n + 1)]
    lambda_ += [1 + h, 1 + 2 * h, 1 + 3 * h]
    return (1 / (1 + np.exp(lambda_))).astype(np.float32)


@pytest.mark.parametrize("name", ORDERS)
def test_error_falls_at_the_order(name):
    x, errors = jnp.linspace(-2, 2, 6).reshape(3, 2), []
    for n in COUNTS:
        grid = grid_of(n)
        way = SOLVERS[name](velocity, x, grid, trajectory=True)
        exact = solution(np.float64(x), np.float64(grid[0]), np.float64(grid[-4]))
        errors.append(np.abs(way[-4] - exact).max())
    order = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
    print(f"{name}: order {order:.2f}, errors {errors[0]:.1e} to {errors[-1]:.1e}")
    assert order > ORDERS[name] - 0.2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_the_integral_near_zero_and_far_from_it(k):
    z = np.array([-20, -3, -1.01, -0.99, -1e-4, 0, 0.5], np.float32)
    # phi_k(z) = int_0^1 e^((1 - u) z) u^(k - 1) / (k - 1)! du
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = (u + 1) / 2, w / 2
    factor = u ** (k - 1) / np.prod(np.arange(1, k))
    integral = (np.exp((1 - u) * z[:, None].astype(float)) * factor) @ w
    np.testing.assert_allclose(phi(k, jnp.array(z)), integral, rtol=1e-5)


def res_multistep(x, sigmas):
    """comfy/k_diffusion/sampling.py, res_multistep with eta = 0, in float64."""
    old = None
    for i in range(len(sigmas) - 1):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = x - sigma * velocity(x, np.full(len(x), sigma))
        if sigma_next == 0 or old is None:
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
        else:
            t, t_next, t_old = -np.log([sigma, sigma_next, sigmas[i - 1]])
            h = t_next - t
            c2 = (t_old - t) / h
            phi1 = np.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            b1, b2 = phi1 - phi2 / c2, phi2 / c2
            x = np.exp(-h) * x + h * (b1 * denoised + b2 * old)
        old = denoised
    return x


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_res_2m_is_comfyuis_res_multistep(steps, key):
    x, grid = jax.random.normal(key, (8, 5)), grids.released(steps, 3.0)
    theirs = res_multistep(np.float64(x), np.float64(grid))
    np.testing.assert_allclose(SOLVERS["res_2m"](velocity, x, grid), theirs, atol=2e-6)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_mask_between_steps_is_kept(name, key):
    """`after` sees every step, and the corrector does not leak into what it sets."""
    x, grid = jax.random.normal(key, (2, 4)), grids.released(6, 3.0)
    keep = jnp.array([True, False, True, False])
    after = lambda x, t, i: jnp.where(keep, 1 - t, x)
    way = SOLVERS[name](velocity, x, grid, after=after, trajectory=True)
    kept = jnp.broadcast_to(1 - grid[1:, None, None], (6, 2, 2))
    chex.assert_trees_all_close(way[1:, :, keep], kept)
    free = SOLVERS[name](velocity, x, grid, trajectory=True)
    chex.assert_trees_all_close(way[:, :, ~keep], free[:, :, ~keep], atol=1e-6)
