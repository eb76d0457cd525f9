"""Guidances against diffusers' guiders, over the steps of a run, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import guiders
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from parity import convert

from sd3_jax.diffusion import grids
from sd3_jax.diffusion.guidance import Weakened, guided
from sd3_jax.diffusion.solvers import euler

STEPS, SCALE, SHAPE = 10, 4.0, (3, 4, 6, 6)
DRAW = np.random.default_rng(0)
START = DRAW.standard_normal(SHAPE).astype(np.float32)
COND, UNCOND, WORSE = (DRAW.standard_normal(SHAPE).astype(np.float32) for _ in "123")


def network(x, t, cond):
    """A field that is no straight line, of either library's arrays."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else jnp.tanh
    return tanh(1.5 * x + cond) * (0.5 + t) - 0.3 * cond + 0.2 * x


def run_ours(**options):
    cond, uncond, worse = map(jnp.asarray, (COND, UNCOND, WORSE))
    velocity = lambda x, t, c: network(x, t[:, None, None, None], c)
    weak = lambda x, t, c: network(x, t[:, None, None, None], worse)
    if window := options.pop("window", None):
        options["weakened"] = Weakened(weak, 2.8, window(GRID))
    options = dict(scale=SCALE, grid=GRID, weak=weak) | options
    v = guided(velocity, cond, uncond, **options)
    return euler(v, jnp.asarray(START), GRID)


def run_theirs(guider):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    x = torch.tensor(START)
    cond, uncond, worse = map(torch.tensor, (COND, UNCOND, WORSE))
    inputs = {"pred_cond": cond, "pred_uncond": uncond, "pred_cond_skip": worse}
    if isinstance(guider, guiders.AutoGuidance):
        inputs["pred_uncond"] = worse
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(i, STEPS, t)
        # Makes the buffer of the momentum, and is the pipelines' first call.
        guider.prepare_inputs({"x": (x, x)}) if i == 0 else None
        count = guider.num_conditions
        names = guider._input_predictions[:count]
        if count == 2 and "pred_cond_skip" in guider._input_predictions:
            names = ["pred_cond", "pred_uncond"]
        predictions = {k: network(x, t / 1000, inputs[k]) for k in names}
        x = scheduler.step(guider.forward(**predictions).pred, t, x).prev_sample
    return x.numpy()


GRID = grids.released(STEPS, 3.0)
THIRD = dict(window=lambda grid: grids.skip_window(grid, 0.01, 0.6))
APG = guiders.AdaptiveProjectedGuidance
CASES = {
    "cfg": (guiders.ClassifierFreeGuidance(SCALE), {}),
    "cfg, rescaled": (
        guiders.ClassifierFreeGuidance(SCALE, 0.7),
        dict(rescale=0.7),
    ),
    "cfg, a part of the steps": (
        guiders.ClassifierFreeGuidance(SCALE, start=0.2, stop=0.7),
        dict(interval=(float(GRID[6]), float(GRID[2]))),
    ),
    "cfg_zero": (
        guiders.ClassifierFreeZeroStarGuidance(SCALE),
        dict(method="cfg_zero"),
    ),
    "cfg_zero, no zeros, rescaled": (
        guiders.ClassifierFreeZeroStarGuidance(SCALE, 0, 0.3),
        dict(method="cfg_zero", options=dict(zero_steps=0), rescale=0.3),
    ),
    "cfg_zero, three zeros": (
        guiders.ClassifierFreeZeroStarGuidance(SCALE, 3),
        dict(method="cfg_zero", options=dict(zero_steps=3)),
    ),
    "apg": (
        APG(SCALE, -0.5, 15.0, eta=0.0),
        dict(method="apg"),
    ),
    "apg, all numbers": (
        APG(SCALE, 0.6, 4.0, eta=0.3, guidance_rescale=0.5),
        dict(
            method="apg",
            options=dict(momentum=0.6, threshold=4.0, eta=0.3),
            rescale=0.5,
        ),
    ),
    "apg, a part of the steps": (
        APG(SCALE, 0.6, 0.0, eta=0.0, start=0.0, stop=0.6),
        dict(
            method="apg",
            options=dict(momentum=0.6, threshold=0.0),
            interval=(float(GRID[5]), 1.0),
        ),
    ),
    "tangential": (
        guiders.TangentialClassifierFreeGuidance(SCALE),
        dict(method="tangential"),
    ),
    "autoguidance": (
        guiders.AutoGuidance(SCALE, auto_guidance_layers=[1], dropout=0.1),
        dict(method="autoguidance"),
    ),
    "skip layers": (
        guiders.SkipLayerGuidance(
            SCALE, skip_layer_guidance_stop=0.6, skip_layer_guidance_layers=[1]
        ),
        THIRD,
    ),
    "skip layers, rescaled": (
        guiders.SkipLayerGuidance(
            SCALE,
            skip_layer_guidance_stop=0.6,
            skip_layer_guidance_layers=[1],
            guidance_rescale=0.5,
        ),
        THIRD | dict(rescale=0.5),
    ),
    "pag": (
        guiders.PerturbedAttentionGuidance(
            SCALE, perturbed_guidance_stop=0.6, perturbed_guidance_layers=[1]
        ),
        THIRD | dict(method="pag"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_guider(case):
    guider, options = CASES[case]
    theirs = run_theirs(guider)
    error = convert.error(run_ours(**options), theirs)
    print(f"{case}: {error:.1e}")
    assert error < 1e-5
    if case != "cfg":
        assert convert.error(run_ours(), theirs) > 1e-2
