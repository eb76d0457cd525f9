"""Step caches against diffusers' hooks, on SD3.5-medium's kind of transformer."""

import contextlib
import copy
import functools
import io
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import hooks
from diffusers.hooks import mag_cache
from diffusers.models.cache_utils import CacheMixin
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.sampling.cache_calibration import Calibration

STEPS = 12
SIZE = dict(height=48, width=64)
NOISE = np.random.default_rng(0).standard_normal((1, 6, 8, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    folder = miniature.folder("sd35_medium")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return pipe, sd3_jax.load(str(folder), mesh=mesh, dtype="float32")


def run_theirs(pipe, apply, transformer=None):
    """Latents, and the steps in which the third block ran."""
    transformer = transformer or copy.deepcopy(pipe.transformer)
    blocks = transformer.transformer_blocks
    inner = blocks[0].residual.blocks if hasattr(blocks[0], "residual") else blocks
    step, computed = [0], np.zeros(STEPS, bool)
    inner[2].attn.register_forward_hook(lambda *_: computed.__setitem__(step[0], True))
    apply(transformer)
    parts = {**pipe.components, "transformer": transformer}
    pipe = diffusers.StableDiffusion3Pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)

    def count(pipe, i, t, kwargs):
        step[0] = i + 1
        return kwargs

    # SD3 is no CacheMixin: its pipeline names no context for the hooks.
    with CacheMixin.cache_context(transformer, "both halves"):
        latents = pipe(
            "a red fox",
            **SIZE,
            num_inference_steps=STEPS,
            guidance_scale=3.0,
            max_sequence_length=20,
            latents=torch.tensor(NOISE).permute(0, 3, 1, 2),
            output_type="latent",
            callback_on_step_end=count,
        ).images
    return latents.permute(0, 2, 3, 1).numpy(), computed


def run_ours(bundle, **options):
    records = []
    run = dict(SIZE, steps=STEPS, guidance=3.0, max_sequence_length=20, latents=NOISE)
    run |= dict(output="latents", cache_report=records.append)
    latents = sd3_jax.generate(bundle, "a red fox", **run, **options)
    return latents, records[0]


def compare(name, ours, theirs):
    (latents, record), (expected, computed) = ours, theirs
    error = convert.error(latents, expected)
    print(f"{name}: {error:.1e}, {STEPS - computed.sum()} of {STEPS} steps skipped")
    np.testing.assert_array_equal(record.computed, computed)
    assert 2 <= computed.sum() < STEPS
    assert error < 1e-4


def with_text_at_the_end(transformer):
    """The hook subtracts the last block's text, which SD3's does not return."""
    last = transformer.transformer_blocks[-1]
    forward = last.forward

    @functools.wraps(forward)
    def run(hidden_states, encoder_hidden_states, **options):
        _, x = forward(hidden_states, encoder_hidden_states, **options)
        return encoder_hidden_states, x

    last.forward = run


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_first_block(pair, threshold):
    pipe, bundle = pair

    def apply(transformer):
        with_text_at_the_end(transformer)
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        hooks.apply_first_block_cache(transformer, config)

    ours = run_ours(
        bundle, cache="first_block", cache_options=dict(threshold=threshold)
    )
    compare(f"first_block {threshold}", ours, run_theirs(pipe, apply))


@pytest.fixture(scope="module")
def curve(pair):
    """diffusers' calibration, which it prints."""
    config = mag_cache.MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_theirs(pair[0], lambda x: mag_cache.apply_mag_cache(x, config))
    return np.array(json.loads(printed.getvalue().splitlines()[-2]), np.float32)


def test_magcache_calibration(pair, curve):
    _, record = run_ours(pair[1], cache="calibration")
    error = np.abs(np.asarray(record.measures) - curve).max()
    print(f"curve {curve.round(3)}: {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize(
    "options, length", [({}, STEPS), (dict(most_skipped=1, retention=0.4), 30)]
)
def test_magcache(pair, curve, options, length):
    pipe, bundle = pair
    options = dict(threshold=0.5, most_skipped=3, retention=0.2) | options
    # Of as many steps as the run, or interpolated.
    ratios = np.resize(curve, length)
    config = mag_cache.MagCacheConfig(
        threshold=options["threshold"],
        max_skip_steps=options["most_skipped"],
        retention_ratio=options["retention"],
        num_inference_steps=STEPS,
        mag_ratios=torch.tensor(ratios),
    )
    theirs = run_theirs(pipe, lambda x: mag_cache.apply_mag_cache(x, config))
    print_of = bundle.unadapted_fingerprint("denoiser")
    ours = run_ours(
        bundle,
        cache="magcache",
        cache_options=options,
        cache_calibration=Calibration(print_of, ratios),
    )
    compare(f"magcache {options}", ours, theirs)


class Residual(torch.nn.Module):
    """What all blocks add to the image tokens: the module that the hook predicts."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, text, **options):
        start = x
        for block in self.blocks:
            text, x = block(x, text, **options)
        return x - start


class AllBlocks(torch.nn.Module):
    context_pre_only = True

    def __init__(self, blocks):
        super().__init__()
        self.residual = Residual(blocks)

    def forward(self, hidden_states, encoder_hidden_states, temb, **_):
        added = self.residual(hidden_states, encoder_hidden_states, temb=temb)
        return encoder_hidden_states, hidden_states + added


@pytest.mark.parametrize("interval, warmup, order", [(2, 3, 1), (3, 2, 2), (4, 1, 0)])
def test_taylorseer(pair, interval, warmup, order):
    pipe, bundle = pair
    transformer = copy.deepcopy(pipe.transformer)
    whole = AllBlocks(transformer.transformer_blocks)
    transformer.transformer_blocks = torch.nn.ModuleList([whole])
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=warmup,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.0\.residual"],
    )
    apply = lambda x: hooks.apply_taylorseer_cache(x, config)
    options = dict(interval=interval, warmup=warmup, order=order)
    ours = run_ours(bundle, cache="taylorseer", cache_options=options)
    compare(f"taylorseer {options}", ours, run_theirs(pipe, apply, transformer))
