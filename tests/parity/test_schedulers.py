"""Grids and solvers against diffusers' schedulers, on a velocity of closed form."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import convert

from sd3_jax.diffusion import grids, solvers

X = np.random.default_rng(0).standard_normal((2, 4, 4, 16)).astype(np.float32)


def velocity(x, t):
    """Of data that are Gaussian around 0.7 with a standard deviation of a half."""
    a, b = 1 - t, t
    mean, var = a * 0.7, (a * 0.5) ** 2 + b**2
    x0 = 0.7 + a * 0.25 / var * (x - mean)
    return (x - x0) / t


def theirs(scheduler, **kwargs):
    """The latents after diffusers' own loop, and the t's that it visited."""
    scheduler.set_timesteps(**kwargs)
    x = torch.tensor(X)
    whole = scheduler.timesteps.dtype == torch.int64  # rounded for the network only
    exact = scheduler.sigmas[:-1] * 1000 if whole else scheduler.timesteps
    for t, time in zip(scheduler.timesteps, exact):
        v = velocity(x.double(), float(time) / 1000)
        x = scheduler.step(v.float(), t, x, return_dict=False)[0]
    return x.numpy(), scheduler.sigmas.numpy()


def ours(name, grid):
    v = lambda x, t: velocity(x, t[:, None, None, None])
    return jax.jit(lambda x, g: solvers.SOLVERS[name](v, x, g))(jnp.array(X), grid)


@pytest.mark.parametrize("steps", [3, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    wanted, sigmas = theirs(scheduler, num_inference_steps=steps)
    grid = grids.released(steps, shift)
    np.testing.assert_allclose(grid, sigmas, rtol=1e-6)
    assert convert.error(ours("euler", grid), wanted) < 2e-5


@pytest.mark.parametrize("mu", [0.5, 1.1])
def test_dynamic_shifting(mu):
    options = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(num_inference_steps=9, mu=mu)
    grid = grids.dynamic(9, mu)
    np.testing.assert_allclose(grid, scheduler.sigmas.numpy(), rtol=1e-6)
    for tokens, wanted in (256, 0.5), (4096, 1.15), (1024, 0.63):
        assert grids.linear_mu(tokens) == pytest.approx(wanted)


def test_given_sigmas_are_shifted_too():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2, 0.05])
    grid = grids.custom([1.0, 0.6, 0.2, 0.05], 3.0)
    np.testing.assert_allclose(grid, scheduler.sigmas.numpy(), rtol=1e-6)


@pytest.mark.parametrize("sigmas", [[], [0.5, 0.6], [1.1], [0.5, 0.0], [0.5, 0.5]])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas: got"):
        grids.custom(sigmas, 1.0)


@pytest.mark.parametrize("steps", [2, 4, 8, 15, 30])
def test_dpmpp_2m_on_flows(steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    wanted, sigmas = theirs(scheduler, num_inference_steps=steps)
    grid = grids.flow(steps, 3.0)
    np.testing.assert_allclose(grid, sigmas, rtol=1e-5)
    assert convert.error(ours("dpmpp_2m_flow", grid), wanted) < 2e-4


def test_heun():
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    wanted, sigmas = theirs(scheduler, num_inference_steps=8)
    grid = np.append(sigmas[:-1:2], np.float32(0))
    assert convert.error(ours("heun", grid), wanted) < 2e-5


def test_the_released_codes_dpmpp_2m():
    grid, x, last = (
        grids.released(8, 3.0).astype(np.float64),
        X.astype(np.float64),
        None,
    )
    for i, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        x0 = x - t * velocity(x, t)
        step = x0
        if last is not None and t_next > 0:
            h, h_last = np.log(t / t_next), np.log(grid[i - 1] / t)
            r = h_last / h
            step = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * last
        x, last = t_next / t * x + (1 - t_next / t) * step, x0
    assert convert.error(ours("dpmpp_2m", grids.released(8, 3.0)), x) < 2e-5


@pytest.mark.parametrize("steps", [1, 5, 28])
@pytest.mark.parametrize(
    "start, stop", [(0.0, 1.0), (0.01, 0.2), (0.3, 0.3), (0.1, 0.9)]
)
def test_windows_hold_the_steps_that_diffusers_counts(steps, start, stop):
    grid, n = grids.released(steps, 3.0), steps
    inside = lambda window: [window[0] <= t <= window[1] for t in grid[:-1]]
    skip = [n * start < i < n * stop for i in range(n)]
    assert inside(grids.skip_window(grid, start, stop)) == skip
    keep = [1 - float(i / n < start or (i + 1) / n > stop) > 0 for i in range(n)]
    assert inside(grids.control_window(grid, start, stop)) == keep


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("steps", [20, 28, 50])
def test_strength_leaves_as_many_steps_as_diffusers(steps, share):
    kept = min(steps * share, steps)
    start = int(max(steps - kept, 0))
    grid = grids.released(steps, 3.0)
    np.testing.assert_array_equal(grids.strength(grid, share), grid[start:])
