"""Guided runs of generate against diffusers' pipeline and guiders, in float32."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import guiders
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding

SIZE = dict(height=48, width=64)
STEPS, SCALE, LENGTH = 5, 5.0, 20
PROMPT, NEGATIVE = "a red fox in the rain", "in the dark"
NOISE = np.random.default_rng(0).standard_normal((1, 6, 8, 16)).astype(np.float32)
OURS = dict(SIZE, steps=STEPS, guidance=SCALE, max_sequence_length=LENGTH)
OURS |= dict(negative_prompts=NEGATIVE, latents=NOISE, output="latents")


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def pair():
    # Without qk-norm and dual attention, which diffusers' PAG does not know.
    folder = miniature.folder("sd3_medium")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return pipe, sd3_jax.load(str(folder), mesh=mesh, dtype="float32")


@pytest.mark.parametrize("layers", [[1], [2, 3]])
def test_perturbed_attention(pair, layers):
    pipe, bundle = pair
    images = "image_encoder", "feature_extractor"
    perturbed = diffusers.StableDiffusion3PAGPipeline(
        **{k: v for k, v in pipe.components.items() if k not in images},
        pag_applied_layers=[f"blocks.{i}" for i in layers],
    )
    perturbed.set_progress_bar_config(disable=True)
    wanted = perturbed(
        PROMPT,
        **SIZE,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        pag_scale=2.0,
        max_sequence_length=LENGTH,
        latents=nchw(NOISE),
        output_type="latent",
    ).images
    options = dict(layers=layers, scale=2.0)
    run = dict(OURS, guidance_method="pag", guidance_options=options)
    found = sd3_jax.generate(bundle, PROMPT, **run)
    error = convert.error(found, nhwc(wanted))
    print(f"pag of layers {layers}: {error:.1e}")
    assert error < 1e-4
    assert convert.error(sd3_jax.generate(bundle, PROMPT, **OURS), found) > 1e-2


def run_of_guider(pipe, guider):
    """The loop of diffusers' modular pipelines, with the guider's two passes."""
    c, u, pooled_c, pooled_u = pipe.encode_prompt(
        PROMPT, None, None, negative_prompt=NEGATIVE, max_sequence_length=LENGTH
    )
    pipe.scheduler.set_timesteps(STEPS)
    x = nchw(NOISE)
    for i, t in enumerate(pipe.scheduler.timesteps):
        guider.set_state(i, STEPS, t)
        states = guider.prepare_inputs({"text": (c, u), "pooled": (pooled_c, pooled_u)})
        for state in states:
            with torch.no_grad():
                state.noise_pred = pipe.transformer(
                    x, state.text, state.pooled, t.expand(1), return_dict=False
                )[0]
        x = pipe.scheduler.step(guider(states).pred, t, x).prev_sample
    return nhwc(x)


@pytest.mark.parametrize(
    "guider, options",
    [
        (
            guiders.ClassifierFreeZeroStarGuidance(SCALE),
            dict(guidance_method="cfg_zero"),
        ),
        (
            guiders.AdaptiveProjectedGuidance(SCALE, -0.5, 8.0, eta=0.2),
            dict(guidance_method="apg", guidance_options=dict(threshold=8.0, eta=0.2)),
        ),
        (
            guiders.TangentialClassifierFreeGuidance(SCALE, 0.5),
            dict(guidance_method="tangential", guidance_rescale=0.5),
        ),
    ],
    ids=["cfg_zero", "apg", "tangential"],
)
def test_a_guider(pair, guider, options):
    pipe, bundle = pair
    wanted = run_of_guider(pipe, guider)
    error = convert.error(sd3_jax.generate(bundle, PROMPT, **OURS, **options), wanted)
    print(f"{options['guidance_method']}: {error:.1e}")
    assert error < 1e-4
