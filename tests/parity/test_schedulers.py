"""Grids and solvers against diffusers' schedulers, on a velocity of closed form."""

import json
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    calculate_shift,
)
from parity import convert

from sd3_jax.diffusion import grids, solvers
from sd3_jax.errors import UserError
from sd3_jax.sampling import scheduler_config as schedulers

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


EULER, HEUN, LCM, DPM = (
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.FlowMatchLCMScheduler,
    diffusers.DPMSolverMultistepScheduler,
)
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
TOKENS = 1_600
OPTIONS = [  # (class, its options, the solver that it is)
    (EULER, dict(), "euler"),
    (EULER, dict(shift=5.0), "euler"),
    (EULER, DYNAMIC, "euler"),
    (EULER, DYNAMIC | dict(base_image_seq_len=100, max_image_seq_len=9_000), "euler"),
    (EULER, DYNAMIC | dict(time_shift_type="linear", shift=7.0), "euler"),
    (EULER, dict(shift=3.0, shift_terminal=0.1), "euler"),
    (EULER, DYNAMIC | dict(shift_terminal=0.02), "euler"),
    (EULER, dict(shift=3.0, use_karras_sigmas=True), "euler"),
    (EULER, DYNAMIC | dict(use_karras_sigmas=True, shift_terminal=0.1), "euler"),
    (EULER, dict(shift=3.0, use_exponential_sigmas=True), "euler"),
    (EULER, dict(shift=3.0, use_beta_sigmas=True), "euler"),
    (EULER, DYNAMIC | dict(use_beta_sigmas=True, time_shift_type="linear"), "euler"),
    (EULER, dict(shift=3.0, stochastic_sampling=True), "lcm"),
    (HEUN, dict(shift=3.0), "heun"),
    (LCM, dict(shift=3.0), "lcm"),
    (LCM, DYNAMIC | dict(use_exponential_sigmas=True), "lcm"),
    (DPM, FLOW, "dpmpp_2m_flow"),
    (DPM, FLOW | dict(solver_order=1, lower_order_final=False), "euler"),
    (DPM, FLOW | dict(use_dynamic_shifting=True), "dpmpp_2m_flow"),
]


def folder(scheduler):
    """What diffusers writes of it."""
    return json.loads(scheduler.to_json_string())


def mu_of(config):
    """The pipeline's, for TOKENS."""
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    usual = (256, 4096, 0.5, 1.16)
    return calculate_shift(TOKENS, *map(config.get, names, usual))


@pytest.mark.parametrize("steps", [2, 5, 28])
@pytest.mark.parametrize("kind, options, solver", OPTIONS)
def test_a_folders_sigmas_are_diffusers(kind, options, solver, steps):
    scheduler = kind(**options)
    read = schedulers.read(folder(scheduler))
    assert not schedulers.unread(folder(scheduler))
    dynamic = {}
    if options.get("use_dynamic_shifting"):
        dynamic = {"mu": mu_of(scheduler.config)}
    scheduler.set_timesteps(num_inference_steps=steps, **dynamic)
    sigmas = scheduler.sigmas.numpy()
    if kind is HEUN:  # which lists what is between the ends twice
        sigmas = np.append(sigmas[:-1:2], np.float32(0))
    assert (read.solver, read.refused) == (solver, "")
    name, times = read.sampler(steps, TOKENS)
    np.testing.assert_allclose(times, sigmas, atol=1e-6, rtol=1e-5)
    assert name == solver


@pytest.mark.parametrize(
    "options",
    [
        dict(shift=3.0),
        DYNAMIC,
        dict(shift=3.0, shift_terminal=0.1),
        dict(shift=3.0, use_karras_sigmas=True),
    ],
)
def test_given_sigmas_go_through_the_folders_settings(options):
    scheduler, sigmas = EULER(**options), [1.0, 0.6, 0.2, 0.05]
    mu = {"mu": 0.7} if "use_dynamic_shifting" in options else {}
    scheduler.set_timesteps(sigmas=sigmas, **mu)
    read = schedulers.read(folder(scheduler))
    _, times = read.sampler(28, TOKENS, sigmas=sigmas, **mu)
    np.testing.assert_allclose(times, scheduler.sigmas.numpy(), atol=1e-6)


@pytest.mark.parametrize("sigmas", [[], [0.5, 0.6], [1.1], [0.5, 0.0], [0.5, 0.5]])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(UserError, match="sigmas: got"):
        grids.custom(sigmas)


def test_mu_lies_on_the_line_through_its_ends():
    for tokens, wanted in (256, 0.5), (4096, 1.15), (1024, 0.63):
        assert grids.linear_mu(tokens) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "scheduler", [LCM(shift=3.0), EULER(shift=3.0, stochastic_sampling=True)]
)
def test_lcm_draws_where_diffusers_does(scheduler, monkeypatch):
    draws = np.random.default_rng(3).standard_normal((5, *X.shape)).astype(np.float32)
    left = iter(draws)
    module = sys.modules[type(scheduler).__module__]
    drawn = lambda shape, **kwargs: torch.tensor(next(left))
    monkeypatch.setattr(module, "randn_tensor", drawn)
    wanted, _ = theirs(scheduler, num_inference_steps=5)
    solver, grid = schedulers.read(folder(scheduler)).sampler(5, TOKENS)
    v = lambda x, t: velocity(x, t[:, None, None, None])
    draw = lambda i: jnp.asarray(draws)[i]
    made = solvers.SOLVERS[solver](v, jnp.array(X), grid, draw=draw)
    assert convert.error(made, wanted) < 2e-5


def test_dpm_of_the_first_order_is_euler():
    scheduler = DPM(**FLOW, solver_order=1)
    wanted, _ = theirs(scheduler, num_inference_steps=6)
    solver, grid = schedulers.read(folder(scheduler)).sampler(6, TOKENS)
    assert convert.error(ours(solver, grid), wanted) < 2e-5


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
