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
from sd3_jax.sampling.schedulers import scheduler_config as schedulers

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
    return trajectory(scheduler)[-1], scheduler.sigmas.numpy()


def trajectory(scheduler, noises=None, dtype=torch.float32):
    """The latents of all steps, with the noise of each step of a stochastic one."""
    x = torch.tensor(X).to(dtype)
    way = [x]
    whole = scheduler.timesteps.dtype == torch.int64  # rounded for the network only
    exact = scheduler.sigmas[:-1] * 1000 if whole else scheduler.timesteps
    for i, (t, time) in enumerate(zip(scheduler.timesteps, exact)):
        v = velocity(x.double(), float(time) / 1000).to(dtype)
        options = {} if noises is None else {"variance_noise": torch.tensor(noises[i])}
        x = scheduler.step(v, t, x, return_dict=False, **options)[0]
        way.append(x)
    return torch.stack(way).numpy()


def ours(name, grid, **options):
    v = lambda x, t: velocity(x, t[:, None, None, None])
    solver = lambda x, g: solvers.SOLVERS[name](v, x, g, **options)
    return jax.jit(solver)(jnp.array(X), grid)


@pytest.mark.parametrize("steps", [3, 4, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    wanted, sigmas = theirs(scheduler, num_inference_steps=steps)
    grid = grids.released(steps, shift)
    np.testing.assert_allclose(grid, sigmas, rtol=1e-6)
    assert convert.error(ours("euler", grid), wanted) < 2e-5


EULER, HEUN, LCM, DPM, UNIPC, DEIS = (
    diffusers.FlowMatchEulerDiscreteScheduler,
    diffusers.FlowMatchHeunDiscreteScheduler,
    diffusers.FlowMatchLCMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.DEISMultistepScheduler,
)
DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
SDE = dict(algorithm_type="sde-dpmsolver++")
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
    (DPM, FLOW | dict(solver_order=3), "dpmpp_3m_flow"),
    (DPM, FLOW | SDE, "dpmpp_2m_sde"),
    (UNIPC, FLOW, "unipc_2"),
    (UNIPC, FLOW | dict(solver_order=3), "unipc_3"),
    (UNIPC, FLOW | dict(use_dynamic_shifting=True), "unipc_2"),
    (UNIPC, FLOW | dict(shift_terminal=0.1), "unipc_2"),
    (DEIS, FLOW, "deis_2"),
    (DEIS, FLOW | dict(solver_order=3), "deis_3"),
    (DEIS, FLOW | dict(solver_order=1), "euler"),
    (DEIS, FLOW | dict(use_dynamic_shifting=True), "deis_2"),
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
    if kind is DEIS:  # which ends with the last sigma twice, and with its noise
        sigmas = np.append(sigmas[:-1], np.float32(0))
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


MULTISTEP = [
    (DPM, dict(solver_order=3), "dpmpp_3m_flow"),
    (UNIPC, dict(), "unipc_2"),
    (UNIPC, dict(solver_order=3), "unipc_3"),
    (DEIS, dict(), "deis_2"),
    (DEIS, dict(solver_order=3), "deis_3"),
    (DPM, SDE, "dpmpp_2m_sde"),
]


@pytest.mark.parametrize("steps", [2, 4, 8, 15, 30])
@pytest.mark.parametrize("kind, options, name", MULTISTEP)
def test_multistep_solvers_on_flows(kind, options, name, steps):
    """All steps, each within 1e-5 of the standard deviation of diffusers'."""
    scheduler = kind(**FLOW | options)
    scheduler.set_timesteps(num_inference_steps=steps)
    noises, drawn = None, {}
    if name.endswith("sde"):
        shape = (steps, *X.shape)
        noises = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        drawn = {"draw": lambda i: jnp.asarray(noises)[i]}
    exact = kind is DEIS
    if exact:  # whose weights cancel: in float32 it is 1e-4 off its own formula
        scheduler.sigmas = scheduler.sigmas.double()
    wanted = trajectory(scheduler, noises, torch.float64 if exact else torch.float32)
    solver, grid = schedulers.read(folder(scheduler)).sampler(steps, TOKENS)
    assert solver == name
    way = np.asarray(ours(solver, grid, trajectory=True, **drawn))
    if kind is DEIS:  # its last step stays where it is
        way, wanted = way[:-1], wanted[:-1]
    errors = [convert.error(a, b) for a, b in zip(way, wanted)]
    print(f"{name}, {steps} steps: at most {max(errors):.1e}")
    assert max(errors) < 1e-5


@pytest.mark.parametrize("steps", [2, 4, 20])
def test_euler_ancestral_is_diffusers(steps, monkeypatch):
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    grid = grids.released(steps, 3.0)
    scheduler.set_timesteps(sigmas=grid.tolist())
    draws = np.random.default_rng(3).standard_normal((steps, *X.shape))
    left = iter(np.float32(draws))
    module = sys.modules[type(scheduler).__module__]
    drawn = lambda shape, **kwargs: torch.tensor(next(left))
    monkeypatch.setattr(module, "randn_tensor", drawn)
    scheduler.timesteps = scheduler.timesteps[:-1]  # it lists the end too
    draw = lambda i: jnp.asarray(np.float32(draws))[i]
    found = ours("euler_ancestral", grid, draw=draw)
    assert convert.error(found, trajectory(scheduler)[-1]) < 2e-5


@pytest.mark.parametrize("steps", [1, 2, 7, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_spacings_are_diffusers(name, shift, steps):
    scheduler = EULER(shift=shift, **{f"use_{name}_sigmas": True})
    scheduler.set_timesteps(num_inference_steps=steps)
    wanted = scheduler.sigmas.numpy()
    np.testing.assert_allclose(grids.make(name, steps, shift), wanted, rtol=1e-5)


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
