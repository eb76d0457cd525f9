"""Whole runs of 8 steps against diffusers, from the same noise, in float32."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines import stable_diffusion_3 as theirs
from parity import convert, miniature

import sd3_jax
from sd3_jax import errors
from sd3_jax.distributed import sharding
from sd3_jax.sampling.text.prompts import Conditioning

# What a run does is the same whichever blocks the denoiser has: text_to_image is of all
# kinds, the rest is quick with the one that has the most.
one_kind = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(kind, marks=() if kind == "sd35_medium" else pytest.mark.slow)
        for kind in miniature.KINDS
    ],
    indirect=True,
    scope="module",
)

PROMPTS = ["a red fox in the rain", "Red! FOX, the 2nd"]
SECOND = ["the fox", "a fox in red"]
THIRD = ["the red fox in a red box", "foxes"]
NEGATIVE = ["in the dark", "a blur"]
SIZE = dict(height=64, width=96)
STEPS, SCALE, LENGTH = 8, 5.0, 40
NOISE = np.random.default_rng(0).standard_normal((2, 8, 12, 16)).astype(np.float32)
IMAGE = np.random.default_rng(1).uniform(size=(2, 64, 96, 3)).astype(np.float32)
OURS = dict(SIZE, steps=STEPS, guidance=SCALE, max_sequence_length=LENGTH)
THEIRS = dict(
    SIZE,
    prompt=PROMPTS,
    num_inference_steps=STEPS,
    guidance_scale=SCALE,
    max_sequence_length=LENGTH,
)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module", params=miniature.KINDS)
def pair(request):
    folder = miniature.folder(request.param)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, sd3_jax.load(str(folder), mesh=one_device(), dtype="float32")


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    """diffusers' noise is ours, and it takes the mean of the autoencoder's posterior,
    so that no generator of PyTorch's has a say."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda d, *a: d.mode())
    for name in ("img2img", "inpaint"):
        module = getattr(theirs, f"pipeline_stable_diffusion_3_{name}")
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: nchw(NOISE))


def test_text_to_image_with_three_prompts(pair):
    pipe, bundle = pair
    texts = dict(THEIRS, prompt_2=SECOND, prompt_3=THIRD, negative_prompt=NEGATIVE)
    wanted = pipe(**texts, latents=nchw(NOISE), output_type="np").images
    prompts = [sd3_jax.Prompt(*three) for three in zip(PROMPTS, SECOND, THIRD)]
    run = dict(OURS, negative_prompts=NEGATIVE, latents=NOISE)
    images = sd3_jax.generate(bundle, prompts, **run)
    assert convert.error(images, wanted) < 1e-4
    latents = sd3_jax.generate(bundle, prompts, **run, output="latents")
    theirs = pipe(**texts, latents=nchw(NOISE), output_type="latent").images
    assert convert.error(latents, nhwc(theirs)) < 1e-4
    one_text = sd3_jax.generate(bundle, PROMPTS, **run, output="latents")
    assert convert.error(one_text, nhwc(theirs)) > 0.05


@one_kind
def test_without_guidance(pair):
    pipe, bundle = pair
    wanted = pipe(
        **dict(THEIRS, guidance_scale=1.0), latents=nchw(NOISE), output_type="latent"
    )
    run = dict(OURS, guidance=1.0, latents=NOISE, output="latents")
    found = sd3_jax.generate(bundle, PROMPTS, **run)
    assert convert.error(found, nhwc(wanted.images)) < 1e-4


@one_kind
def test_skipped_layers(pair):
    pipe, bundle = pair
    wanted = pipe(
        **THEIRS,
        latents=nchw(NOISE),
        skip_guidance_layers=[1, 2],
        skip_layer_guidance_scale=2.0,
        skip_layer_guidance_stop=0.5,
        output_type="latent",
    )
    run = dict(OURS, latents=NOISE, output="latents")
    skip = dict(skip_layers=[1, 2], skip_scale=2.0, skip_stop=0.5)
    found = sd3_jax.generate(bundle, PROMPTS, **run, **skip)
    assert convert.error(found, nhwc(wanted.images)) < 1e-4
    assert convert.error(sd3_jax.generate(bundle, PROMPTS, **run), found) > 1e-2


@one_kind
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_image_to_image(pair, strength):
    pipe, bundle = pair
    changed = diffusers.StableDiffusion3Img2ImgPipeline(**pipe.components)
    changed.set_progress_bar_config(disable=True)
    wanted = changed(**THEIRS, image=nchw(IMAGE), strength=strength, output_type="np")
    found = sd3_jax.generate(
        bundle,
        PROMPTS,
        **OURS,
        latents=NOISE,
        image=bundle.encode_image(IMAGE),
        strength=strength,
    )
    assert convert.error(found, wanted.images) < 1e-4


@one_kind
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(pair, strength):
    """Latents: diffusers' pipeline forgets the autoencoder's shift as it decodes."""
    pipe, bundle = pair
    mask = np.zeros((1, 64, 96, 1), np.float32)
    mask[:, 20:50, 30:90] = 1
    mask[:, :9] = 0.4  # less than a half: it stays
    painted = diffusers.StableDiffusion3InpaintPipeline(**pipe.components)
    painted.set_progress_bar_config(disable=True)
    wanted = painted(
        **THEIRS,
        image=nchw(IMAGE),
        mask_image=nchw(np.repeat(mask, 2, 0)),
        strength=strength,
        output_type="latent",
    )
    x0 = bundle.encode_image(IMAGE)
    run = dict(OURS, latents=NOISE, image=x0, strength=strength, output="latents")
    found = sd3_jax.generate(bundle, PROMPTS, **run, mask=mask)
    assert convert.error(found, nhwc(wanted.images)) < 1e-4
    kept = np.broadcast_to(mask[:, ::8, ::8] < 0.5, found.shape)
    np.testing.assert_allclose(found[kept], np.asarray(x0)[kept], atol=1e-5)


def control_net(pipe, kind, **more):
    """A ControlNet of the pipeline's sizes, as it is published."""
    c = pipe.transformer.config
    shared = dict(
        sample_size=c.sample_size,
        num_layers=2,
        attention_head_dim=c.attention_head_dim,
        num_attention_heads=c.num_attention_heads,
        caption_projection_dim=c.caption_projection_dim,
        pooled_projection_dim=c.pooled_projection_dim,
        pos_embed_max_size=c.pos_embed_max_size,
    )
    options = {
        "joint": dict(joint_attention_dim=c.joint_attention_dim),
        "dual": dict(
            joint_attention_dim=c.joint_attention_dim,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
            force_zeros_for_pooled_projection=False,
        ),
        "single": dict(
            joint_attention_dim=None,
            pos_embed_type=None,
            use_pos_embed=False,
            force_zeros_for_pooled_projection=False,
        ),
    }
    net = diffusers.SD3ControlNetModel(**shared, **options[kind], **more)
    return convert.randomise(net, seed=7)


@one_kind
@pytest.mark.parametrize("kinds", [["joint"], ["dual"], ["single"], ["joint", "joint"]])
def test_control_nets(pair, kinds, tmp_path):
    pipe, bundle = pair
    nets = [control_net(pipe, kind) for kind in kinds]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    scales, starts, stops = [0.7, 0.4], [0.0, 0.3], [0.8, 1.0]
    n = len(nets)
    together = diffusers.SD3MultiControlNetModel(nets) if n > 1 else nets[0]
    controlled = diffusers.StableDiffusion3ControlNetPipeline(
        **{k: v for k, v in pipe.components.items() if k != "controlnet"},
        controlnet=together,
    )
    controlled.set_progress_bar_config(disable=True)
    images = [nchw(2 * IMAGE[:1] - 1), nchw(2 * IMAGE[1:] - 1)][:n]
    several = lambda x: list(x[:n]) if n > 1 else x[0]
    wanted = controlled(
        **THEIRS,
        control_image=several(images),
        controlnet_conditioning_scale=several(scales),
        control_guidance_start=several(starts),
        control_guidance_end=several(stops),
        latents=nchw(NOISE),
        output_type="latent",
    )
    control = [
        sd3_jax.ControlInput(
            sd3_jax.load_control(str(tmp_path / str(i)), bundle),
            IMAGE[i : i + 1],
            scales[i],
            starts[i],
            stops[i],
        )
        for i in range(n)
    ]
    run = dict(OURS, latents=NOISE, output="latents")
    found = sd3_jax.generate(bundle, PROMPTS, **run, control=control)
    assert convert.error(found, nhwc(wanted.images)) < 1e-4
    assert convert.error(sd3_jax.generate(bundle, PROMPTS, **run), found) > 1e-2


@one_kind
def test_a_control_net_that_repaints(pair, tmp_path):
    """Seventeen channels: the picture left, and where it is left."""
    pipe, bundle = pair
    net = control_net(pipe, "joint", extra_conditioning_channels=1)
    net.save_pretrained(tmp_path)
    mask = np.zeros((1, 64, 96, 1), np.float32)
    mask[:, 16:48, 8:80] = 1
    painted = diffusers.StableDiffusion3ControlNetInpaintingPipeline(
        **pipe.components, controlnet=net
    )
    painted.set_progress_bar_config(disable=True)
    wanted = painted(
        **THEIRS,
        control_image=nchw(2 * IMAGE[:1] - 1),
        control_mask=nchw(mask),
        controlnet_conditioning_scale=0.8,
        latents=nchw(NOISE),
        output_type="latent",
    )
    net = sd3_jax.load_control(str(tmp_path), bundle)
    control = sd3_jax.ControlInput(net, IMAGE[:1], 0.8, mask=mask)
    run = dict(OURS, latents=NOISE, output="latents")
    found = sd3_jax.generate(bundle, PROMPTS, **run, control=control)
    assert convert.error(found, nhwc(wanted.images)) < 1e-4
    with pytest.raises(errors.UserError, match="give a mask"):
        control = control._replace(mask=None)
        sd3_jax.generate(bundle, PROMPTS, **run, control=control)


def original_names(state):
    """A single-stream net's tensors as its original file has them."""
    renamed = {}
    for key, x in state.items():
        for old, new in (
            ("attn.to_out.0", "attn.proj"),
            ("ff.net.0.proj", "mlp.fc1"),
            ("ff.net.2", "mlp.fc2"),
            ("norm1.linear", "adaLN_modulation.1"),
        ):
            key = key.replace(old, new)
        if ".to_q." in key:
            parts = [state[key.replace("to_q", f"to_{c}")] for c in "qkv"]
            renamed[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".to_k." not in key and ".to_v." not in key:
            renamed[key] = x
    return renamed


@one_kind
def test_a_control_net_in_its_original_file(pair, tmp_path):
    pipe, bundle = pair
    net = control_net(pipe, "single")
    net.save_pretrained(tmp_path / "folder")
    path = tmp_path / "depth.safetensors"
    safetensors.torch.save_file(original_names(net.state_dict()), path)
    one, other = (
        sd3_jax.load_control(str(x), bundle) for x in (tmp_path / "folder", path)
    )
    assert one.module == dataclasses.replace(other.module, pos_size=one.module.pos_size)
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)


@one_kind
def test_embeddings_and_several_images_of_a_prompt(pair):
    _, bundle = pair
    run = dict(OURS, steps=2, output="latents")
    two = run | dict(images_per_prompt=2)
    both = sd3_jax.generate(bundle, PROMPTS, **two, seed=[3, 3])
    second = sd3_jax.generate(bundle, PROMPTS[1], **two, seed=3)
    assert convert.error(both[2:], np.asarray(second)) < 1e-5
    assert convert.error(both[2], np.asarray(both[3])) > 0.1
    cond = bundle.encode_prompts(PROMPTS, LENGTH)
    uncond = bundle.encode_prompts(["", ""], LENGTH)
    assert isinstance(cond, Conditioning)
    texts = sd3_jax.generate(bundle, PROMPTS, **run | dict(latents=NOISE))
    arrays = sd3_jax.generate(
        bundle, cond, negative_prompts=uncond, **run | dict(latents=NOISE)
    )
    np.testing.assert_array_equal(texts, arrays)
