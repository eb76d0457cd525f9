"""Inputs and outputs of single evaluations against diffusers: posterior, latents of all
steps, residuals of ControlNets, hints of each half of a guided batch."""

import diffusers
import jax
import numpy as np
import pytest
import torch
from parity import convert, miniature
from parity.test_controls import pipe, refused  # noqa: F401
from parity.test_pipelines import control_net, nchw, nhwc, one_device

import sd3_jax
from sd3_jax.diffusion import grids
from sd3_jax.distributed import sharding
from sd3_jax.sampling.text.prompts import Conditioning

RNG = np.random.default_rng(0)
IMAGE = RNG.uniform(size=(2, 32, 48, 3)).astype(np.float32)
LATENTS = RNG.standard_normal((2, 4, 6, 16)).astype(np.float32)
T = np.array([0.9, 0.3], np.float32)
CONTEXT = RNG.standard_normal((2, 85, 160)).astype(np.float32)
POOLED = RNG.standard_normal((2, 128)).astype(np.float32)
COND, UNCOND = Conditioning(CONTEXT, POOLED), Conditioning(-CONTEXT, -POOLED)
ARGS = LATENTS, T, CONTEXT, POOLED
RUN = dict(height=32, width=48, steps=4, latents=LATENTS, output="latents")


@pytest.fixture(scope="module")
def bundle():
    folder = str(miniature.folder("sd35_large"))
    options = dict(dtype="float32", tokenizers_from=None, only=("denoiser", "vae"))
    return sd3_jax.load(folder, mesh=one_device(), **options)


@pytest.fixture(scope="module")
def theirs():
    return miniature.transformer(qk_norm="rms_norm").eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["joint", "single"])
def nets(request, pipe, bundle, tmp_path_factory):  # noqa: F811
    """A ControlNet of diffusers, and ours of its files."""
    net = control_net(pipe, request.param).eval().requires_grad_(False)
    folder = tmp_path_factory.mktemp("net")
    net.save_pretrained(folder)
    return net, sd3_jax.load_control(str(folder), bundle)


def torch_args(latents=LATENTS, t=T):
    return dict(
        hidden_states=nchw(latents),
        timestep=1000 * torch.tensor(t),
        encoder_hidden_states=torch.tensor(CONTEXT),
        pooled_projections=torch.tensor(POOLED),
        return_dict=False,
    )


# The posterior


def test_the_posteriors_moments_and_a_draw_with_given_noise(bundle):
    vae = miniature.vae().eval().requires_grad_(False)
    wanted = vae.encode(nchw(2 * IMAGE - 1)).latent_dist
    posterior = bundle.posterior(IMAGE)
    assert convert.error(posterior.mean, nhwc(wanted.mean)) < 1e-4
    assert convert.error(posterior.logvar, nhwc(wanted.logvar)) < 1e-4
    z = wanted.mean + wanted.std * nchw(LATENTS)
    x0 = (z - vae.config.shift_factor) * vae.config.scaling_factor
    assert convert.error(bundle.encode_image(IMAGE, noise=LATENTS), nhwc(x0)) < 1e-4
    zeros = bundle.encode_image(IMAGE, noise=0 * LATENTS)
    np.testing.assert_array_equal(zeros, bundle.encode_image(IMAGE))


def test_noise_that_does_not_fit(bundle):
    key = jax.random.key(0)
    refused("key and noise: give one", bundle.encode_image, IMAGE, key, noise=LATENTS)
    said = "noise of shape (1, 4, 6, 16): expected (2, 4, 6, 16)"
    refused(said, bundle.encode_image, IMAGE, noise=LATENTS[:1])
    said = "channels come last here"
    refused(said, bundle.encode_image, IMAGE, noise=LATENTS.transpose(0, 3, 1, 2))


# Latents of all steps


def pipeline(theirs):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
    parts |= dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"))
    parts |= dict(transformer=theirs, vae=miniature.vae(), scheduler=scheduler)
    run = diffusers.StableDiffusion3Pipeline(**parts)
    run.set_progress_bar_config(disable=True)
    return run


def test_latents_of_all_steps_are_those_of_diffusers_callback(bundle, theirs):
    steps = []

    def keep(_, i, t, tensors):
        steps.append(nhwc(tensors["latents"]).copy())
        return tensors

    pipeline(theirs)(
        **dict(height=32, width=48, num_inference_steps=4, guidance_scale=5.0),
        latents=nchw(LATENTS),
        prompt_embeds=torch.tensor(CONTEXT),
        pooled_prompt_embeds=torch.tensor(POOLED),
        negative_prompt_embeds=torch.tensor(-CONTEXT),
        negative_pooled_prompt_embeds=torch.tensor(-POOLED),
        callback_on_step_end=keep,
        output_type="latent",
    )
    run = RUN | dict(negative_prompts=UNCOND)
    everything = sd3_jax.generate(bundle, COND, **run, return_latents="all")
    assert everything.shape == (5, *LATENTS.shape)
    np.testing.assert_array_equal(everything[0], LATENTS)
    assert convert.error(everything[1:], np.stack(steps)) < 1e-4
    last = sd3_jax.generate(bundle, COND, **run)
    assert convert.error(everything[-1], np.asarray(last)) < 1e-5


@pytest.mark.parametrize("solver", ["dpmpp_2m_flow", "lcm"])
def test_every_solver_has_a_trajectory_that_ends_at_its_result(solver, bundle):
    run = RUN | dict(guidance=1.0, solver=solver, steps=3, seed=[1, 2])
    options = dict(return_latents="all", image=LATENTS, strength=0.6)
    everything = sd3_jax.generate(bundle, COND, **run | options)
    del options["return_latents"]
    last = sd3_jax.generate(bundle, COND, **run | options)
    assert everything.shape[0] == 3  # two steps of three
    assert convert.error(everything[-1], np.asarray(last)) < 1e-5


def test_trajectories_and_residuals_on_two_devices(bundle):
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    folder = str(miniature.folder("sd35_large"))
    options = dict(dtype="float32", tokenizers_from=None, only=("denoiser",))
    sharded = sd3_jax.load(folder, mesh, **options)
    run = RUN | dict(guidance=1.0, steps=2, return_latents="all")
    one, two = (sd3_jax.generate(b, COND, **run) for b in (bundle, sharded))
    assert convert.error(two, np.asarray(one)) < 1e-4
    residuals = RNG.standard_normal((2, 2, 6, 64)).astype(np.float32)
    one, two = (b.velocity(*ARGS, residuals=residuals) for b in (bundle, sharded))
    assert convert.error(two, np.asarray(one)) < 1e-4
    assert convert.error(two, np.asarray(bundle.velocity(*ARGS))) > 1e-2


def test_all_latents_are_no_images(bundle):
    said = 'return_latents "all" returns no images; set output="latents"'
    run = RUN | dict(output="images", return_latents="all")
    refused(said, sd3_jax.generate, bundle, COND, **run)
    said = 'return_latents "al"; did you mean "all"?'
    refused(said, sd3_jax.generate, bundle, COND, **RUN | dict(return_latents="al"))


# Residuals


def residuals_of(net, hint, theirs):
    x = nchw(LATENTS)
    if net.config.joint_attention_dim is None:  # it sees the transformer's tokens
        args = torch_args() | dict(hidden_states=theirs.pos_embed(x))
        args.pop("encoder_hidden_states")
        args["encoder_hidden_states"] = None
    else:
        args = torch_args()
    if net.config.force_zeros_for_pooled_projection:
        args["pooled_projections"] = torch.zeros(2, 128)
    return net(**args, controlnet_cond=nchw(hint), conditioning_scale=0.7)[0]


def test_residuals_out_of_and_into_the_velocity_are_diffusers(bundle, nets, theirs):
    net, ours = nets
    hint = 0.5 * LATENTS[::-1]
    wanted = residuals_of(net, hint, theirs)
    control = sd3_jax.ControlInput(ours, hint, scale=0.7)
    residuals = bundle.control_residuals(*ARGS, control=control)
    assert residuals.shape == (2, 2, 6, 64)
    for ours_, theirs_ in zip(residuals, wanted):
        assert convert.error(ours_, theirs_) < 1e-4
    v = theirs(**torch_args(), block_controlnet_hidden_states=wanted)[0]
    given = bundle.velocity(*ARGS, residuals=[x.numpy() for x in wanted])
    assert convert.error(given, nhwc(v)) < 1e-4
    assert convert.error(bundle.velocity(*ARGS, residuals=residuals), nhwc(v)) < 1e-4
    assert convert.error(bundle.velocity(*ARGS, control=control), nhwc(v)) < 1e-4
    twice = theirs(
        **torch_args(), block_controlnet_hidden_states=[2 * x for x in wanted]
    )[0]
    added = bundle.velocity(*ARGS, control=[control], residuals=residuals)
    assert convert.error(added, nhwc(twice)) < 1e-4
    assert convert.error(bundle.velocity(*ARGS), nhwc(v)) > 1e-2


@pytest.mark.parametrize("nets", ["joint"], indirect=True)
def test_residuals_and_controls_that_are_refused(bundle, nets):
    control = sd3_jax.ControlInput(nets[1], LATENTS)
    ask = lambda said, **options: refused(said, bundle.velocity, *ARGS, **options)
    zeros = np.zeros((2, 2, 6, 64), np.float32)
    ask(
        "residuals of shape (2, 2, 5, 64): expected (blocks, 2",
        residuals=zeros[:, :, 1:],
    )
    ask("residuals of shape (0,): expected (blocks, 2, 6, 64)", residuals=[])
    ask("residuals: holds values that are NaN", residuals=zeros + np.nan)
    ask("residuals of 6 blocks: expected 1 to 4", residuals=np.zeros((6, 2, 6, 64)))
    ask(
        "residuals of 1 blocks beside a ControlNet of 2: the numbers must be equal",
        residuals=zeros[:1],
        control=control,
    )
    ask("control 0: start 0.0 and stop 0.5", control=control._replace(stop=0.5))
    said = "control 0: unconditional is for guidance"
    ask(said, control=[control._replace(unconditional="off")])
    refused("no control; give", bundle.control_residuals, *ARGS, control=[])


# Hints of each half of a guided batch


def halves(bundle, net, hint, uncond_hint, uncond_scale=0.7):
    """Four steps of Euler by hand, each half of the batch with a hint of its own."""
    grid, x = grids.released(4, 3.0), LATENTS
    for t, t_next in zip(grid[:-1], grid[1:]):
        v = []
        for cond, image, scale in (
            (UNCOND, uncond_hint, uncond_scale),
            (COND, hint, 0.7),
        ):
            control = sd3_jax.ControlInput(net, image, scale=scale)
            times = np.full(2, t, np.float32)
            v.append(np.asarray(bundle.velocity(x, times, *cond, control=control)))
        x = x + (t_next - t) * (v[0] + 5.0 * (v[1] - v[0]))
    return x


@pytest.mark.parametrize("nets", ["joint"], indirect=True)
def test_the_unconditional_half_has_its_own_hint(bundle, nets):
    hint, other = LATENTS[::-1].copy(), 0.3 * LATENTS
    control = sd3_jax.ControlInput(nets[1], hint, scale=0.7)
    run = RUN | dict(negative_prompts=UNCOND)
    paint = lambda half: sd3_jax.generate(
        bundle, COND, **run, control=control._replace(unconditional=half)
    )
    same = sd3_jax.generate(bundle, COND, **run, control=control)
    np.testing.assert_array_equal(paint("same"), same)
    for half, by_hand in {
        "same": halves(bundle, nets[1], hint, hint),
        "zeros": halves(bundle, nets[1], hint, 0 * hint),
        "off": halves(bundle, nets[1], hint, hint, 0.0),
    }.items():
        assert convert.error(paint(half), by_hand) < 1e-4, half
        assert half == "same" or convert.error(same, by_hand) > 1e-3
    wanted = halves(bundle, nets[1], hint, other)
    assert convert.error(paint(other), wanted) < 1e-4
