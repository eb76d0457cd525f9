"""What the blocks show is what PyTorch computes there, and changes no velocity."""

import inspect

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import observation
from sd3_jax.sampling.bundle import Prompt
from sd3_jax.tools.explore import exploration

LENGTH, SIDE = 20, 8


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")


@pytest.fixture(scope="module")
def inputs(bundle):
    cond = bundle.encode_prompts("a red fox", LENGTH)
    latents = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 16))
    return latents.astype(np.float32), np.float32([0.5]), *cond


@pytest.fixture(scope="module")
def seen(bundle, inputs):
    return observation.observe(bundle, *inputs)


def test_the_velocity_is_the_same(bundle, inputs, seen):
    assert convert.error(seen.velocity, np.asarray(bundle.velocity(*inputs))) < 1e-6


def test_attention_and_norms_are_those_of_pytorch(inputs, seen, monkeypatch):
    folder = miniature.folder("sd35_medium")
    model = diffusers.SD3Transformer2DModel.from_pretrained(
        folder, subfolder="transformer"
    )
    image, text = SIDE**2 // 4, 77 + LENGTH
    maps, image_rms, text_rms = [], [], []
    product = torch.nn.functional.scaled_dot_product_attention

    def attend(q, k, v, **options):
        if k.shape[2] == image + text:  # not the attention among image tokens alone
            share = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1).mean(1)
            maps.append(share[:, :image, image:].numpy())
        return product(q, k, v, **options)

    def keep(module, args, outputs):
        rms = lambda x: float(x.square().mean().sqrt())
        words, pixels = outputs
        image_rms.append(rms(pixels))
        text_rms.extend([] if words is None else [rms(words)])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for block in model.transformer_blocks:
        block.register_forward_hook(keep)
    x, t, context, pooled = (torch.tensor(np.asarray(a)) for a in inputs)
    with torch.no_grad():
        model(x.permute(0, 3, 1, 2), context, pooled, timestep=1000 * t)
    ours = np.asarray(seen.attention).reshape(len(maps), 1, image, text)
    assert convert.error(ours, np.stack(maps)) < 1e-4
    np.testing.assert_allclose(seen.image_rms[:, 0], image_rms, rtol=1e-4)
    np.testing.assert_allclose(seen.text_rms[:, 0], text_rms, rtol=1e-4)


def test_a_mesh_shows_the_same(inputs, seen):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    bundle = sd3_jax.load(str(miniature.folder("sd35_medium")), mesh, "float32")
    other = observation.observe(bundle, *inputs)
    for a, b in zip(other, seen):
        assert convert.error(a, np.asarray(b)) < 1e-4


def test_tokens_of_words(bundle):
    tokens = exploration.tokens_of(bundle, "a Red fox, a fox", (), LENGTH)
    assert list(tokens) == ["a", "red", "fox"]
    assert tokens["a"][:2] == [1, 5] and min(tokens["red"]) == 2  # CLIP starts at 1
    assert any(place >= 77 for place in tokens["fox"])
    assert list(exploration.tokens_of(bundle, "a red fox", ["FOX"], LENGTH)) == ["fox"]


@pytest.mark.parametrize(
    "words, complaint",
    [(["cat"], '"cat" is not a word of the prompt'), (["last"], "beyond the tokens")],
)
def test_words_that_cannot_be_mapped(bundle, words, complaint):
    prompt = "a " * 100 + "last"
    with pytest.raises(UserError, match=complaint):
        exploration.tokens_of(bundle, prompt, words, LENGTH)


def test_words_are_those_that_each_encoder_reads(bundle):
    prompt = Prompt("a fox", "a fox", "an owl sits")
    tokens = exploration.tokens_of(bundle, prompt, (), LENGTH)
    assert list(tokens) == ["a", "fox", "an", "owl", "sits"]
    assert max(tokens["fox"]) < 77 <= min(tokens["owl"])


def test_marks_of_weights_are_no_words(bundle):
    weighted = exploration.tokens_of(
        bundle, "a (red:5) fox", (), LENGTH, weighting="parentheses"
    )
    assert list(weighted) == ["a", "red", "fox"]
    plain = exploration.tokens_of(bundle, "a red fox", (), LENGTH)
    assert weighted["fox"][0] == plain["fox"][0]


@pytest.mark.parametrize(
    "changes, complaint",
    [
        (
            dict(latents=np.zeros((1, 5, 4, 16))),
            "latents of 5 x 4: expected sides that",
        ),
        (dict(latents=np.zeros((1, 80, 80, 16))), "latents of 80 x 80: .* at most 48"),
        (
            dict(context=np.zeros((1, 97, 8))),
            r"context of shape \(1, 97, 8\): expected",
        ),
        (dict(pooled=np.zeros((1, 3))), r"pooled of shape \(1, 3\): expected an array"),
        (dict(latents=np.zeros((2, 8, 8, 16)), t=np.ones(2)), "must be equal"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(bundle, inputs, changes, complaint):
    names = ("latents", "t", "context", "pooled")
    arguments = dict(zip(names, inputs)) | changes
    # Unwrapped, as users have them: the tests' own checks of shapes come before.
    for evaluate in (observation.observe, type(bundle).velocity):
        with pytest.raises(UserError, match=complaint):
            inspect.unwrap(evaluate)(bundle, **arguments)


def test_images_that_the_autoencoder_would_crop_are_refused(bundle):
    for method in (bundle.encode_image, bundle.posterior):
        with pytest.raises(UserError, match="33 x 32 pixels: expected sides that are"):
            method(np.zeros((1, 33, 32, 3), np.float32))


def test_moments_are_the_first_the_last_and_between():
    assert exploration.moments_of(28, 3) == [0, 14, 27]
    assert exploration.moments_of(2, 5) == [0, 1]
    assert exploration.moments_of(9, 1) == [0]
