"""The public API: load a released model, generate images, inspect the model.

    bundle = sd3_jax.load("sd3.5_medium/", dtype="bfloat16")
    images = sd3_jax.generate(bundle, ["a red fox"], height=1024, width=1024)

Arrays are NHWC. Latents are shifted and scaled. t is in [0, 1], and 1 is noise. Images
are floats in [0, 1]; inputs may also be bytes or PIL images
(sampling/images/input_images.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float

from sd3_jax.diffusion import grids
from sd3_jax.models import step_cache
from sd3_jax.models.step_cache import Record
from sd3_jax.sampling import (
    argument_checks,
    arguments,
    cache_arguments,
    call_arrays,
    compiled,
    control_arguments,
    guidance_arguments,
    preview_arguments,
    progress_bar,
)
from sd3_jax.sampling.adapters.adapter_bank import Sets
from sd3_jax.sampling.arguments import Texts
from sd3_jax.sampling.bundle import Bundle, Prompt
from sd3_jax.sampling.bundle_loading import load
from sd3_jax.sampling.control import ControlBundle, ControlInput
from sd3_jax.sampling.control_loading import load_control
from sd3_jax.sampling.export import save
from sd3_jax.sampling.images import inpainting, input_images
from sd3_jax.sampling.images.input_images import Pictures
from sd3_jax.sampling.observation import observe

__all__ = ["Bundle", "ControlBundle", "ControlInput", "Prompt"]
__all__ += ["generate", "load", "load_control", "observe", "save"]


def generate(
    bundle: Bundle,
    prompts: Texts,
    *,
    negative_prompts: Texts | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int = 28,
    guidance: float = 5.0,
    seed: int | Sequence[int] = 0,
    solver: str | None = None,
    max_sequence_length: int = 256,
    images_per_prompt: int = 1,
    latents: Float[Array | np.ndarray, "b h w c"] | None = None,
    image: Pictures | None = None,
    mask: Pictures | None = None,
    strength: float = 0.6,
    paste: bool = False,
    mask_blur: float = 0.0,
    mask_padding: int = 0,
    crop_to_mask: int | None = None,
    outpaint: tuple[int, int, int, int] | None = None,
    control: ControlInput | Sequence[ControlInput] | None = None,
    adapters: Sets | None = None,
    skip_layers: Sequence[int] | None = None,
    skip_scale: float = 2.8,
    skip_start: float = 0.01,
    skip_stop: float = 0.2,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    guidance_method: str = "cfg",
    guidance_options: Mapping[str, Any] | None = None,
    guidance_schedule: str | Sequence[tuple[float, float]] = "constant",
    guide: Bundle | None = None,
    grid: str | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
    clip_skip: int = 0,
    prompt_weighting: str | None = None,
    preview: Callable[[int, float, np.ndarray], None] | None = None,
    preview_decoder: Bundle | None = None,
    progress: bool = False,
    cache: str | None = None,
    cache_options: Mapping[str, Any] | None = None,
    cache_calibration: Any = None,
    cache_report: Callable[[Record], None] | None = None,
    output: str = "images",
    return_latents: str = "last",
) -> Float[Array, "*n b _ _ _"]:
    """Generate images (b, height, width, 3) in [0, 1], or their latents.

    With `output="latents"` and `return_latents="all"` the latents are (steps + 1, b, h,
    w, c), at each time from the noise, or the noised image, to the result.

    Rows are in the order p0, p0, p1, p1, ... for `images_per_prompt` of 2. Prompts are
    texts, or what encode_prompts returns. `prompt_weighting` reads weights in them and
    in negative prompts: "parentheses" for (word:1.3), "compel" for word++.

    The noise depends on the seed alone, not on the prompt. With one `seed`, image i of
    the call has the noise of (seed, i). With a seed for each prompt, images count from
    0 within each prompt, so that a row does not depend on the other rows. `latents`
    replace the noise.

    A `guidance` of 1 or less means none: one pass of the network per step. A warning
    says so if negative prompts, `skip_layers` or other options of guidance are given.
    `image`, in [0, 1] or as latents, is changed over the last `strength` of the steps,
    with a `mask` only where that is 1. `skip_layers` are left out of a third velocity,
    from which guidance steers away in steps i of n with n skip_start < i < n skip_stop.

    `guidance_method` is "cfg" or another key of guidance_methods.METHODS, and
    `guidance_options` replace its numbers. `guidance_schedule` changes guidance over t:
    "linear", "cosine", or pairs (t, factor of guidance - 1). `guide` is the weaker
    bundle of "autoguidance".
    `paste` replaces the pixels where the mask is 0 by those of `image`, exactly. The
    mask first grows by `mask_padding` pixels and is blurred by a Gaussian of
    `mask_blur` pixels. `crop_to_mask` cuts out the masked area with so many pixels
    around it, paints it at height x width and pastes it back; the result has the size
    of `image`. `outpaint` adds a border of (left, top, right, bottom) pixels and paints
    it (sampling/images/inpainting.py).

    `adapters` are weights of the bundle's adapters by name for this call, or a list of
    such sets, one for each prompt; by default those of bundle.set_adapters.

    The model's scheduler decides the solver and the t's, unless `solver`, `grid`,
    `shift`, `mu` (the logarithm of the shift) or `sigmas` do; `sigmas` are shifted as
    well, and their number is the number of steps. `preview(i, t, rgb)` is called with a
    rough image after each step, of a pixel for each latent; with `preview_decoder`, a
    bundle with an autoencoder such as TAESD3, of the result's size.

    The first call compiles a program, and one line says so. Another call compiles again
    if it changes the size or number of images, the text's length, whether there is
    guidance, its method or a schedule, which inputs are given, `skip_layers`, the
    ControlNets, which adapters are loaded, whether each prompt has a set of its own,
    the `preview` function or its decoder, and with `return_latents="all"` the number of
    steps. Numbers are data: the seed, `guidance`, `strength`, `sigmas`, `shift`, the
    weights of adapters, and up to 1,024 `steps`. Solvers share programs: euler,
    dpmpp_2m and dpmpp_2m_flow one, dpmpp_3m_flow, unipc, deis and res_2m another, the
    stochastic ones but lcm a third; heun, lcm and adaptive have their own. adaptive
    takes up to `steps` steps of three passes, each image with its own, and no
    `skip_layers` or `control`.

    `progress` shows a bar over the steps (tqdm). Calls with and without it compile two
    programs.

    `cache` leaves out the network's blocks in some steps: "first_block", "magcache" or
    "taylorseer" (models/step_cache.py), with numbers from `cache_options`, which are
    data but for the "order" of taylorseer. "magcache" needs a `cache_calibration`, the
    file that sd3-jax calibrate writes. With a threshold of 0, or an interval of 1,
    there is no cache. `cache_report` gets a Record, whose `computed` (steps,) are the
    steps that were not left out. The decision is one for all images of the call.

    Raises UserError for arguments of wrong types or out of range.
    """
    # --- check the arguments
    argument_checks.instance("bundle", bundle, (Bundle,), "sd3_jax.load")
    all_latents = call_arrays.returns_all(output, return_latents)
    steering = guidance_arguments.checked(
        bundle.part("denoiser").depth,
        scale=guidance,
        interval=guidance_interval,
        rescale=guidance_rescale,
        method=guidance_method,
        options=guidance_options,
        schedule=guidance_schedule,
        skip=guidance_arguments.Layers(skip_layers, skip_scale, skip_start, skip_stop),
        negative=arguments.has_text(negative_prompts),
        guide=guide,
    )
    if guide is not None:
        guidance_arguments.require_guide(bundle, guide)
    skipping = cache_arguments.checked(
        bundle.part("denoiser").depth, cache, cache_options, cache_calibration
    )
    strength = argument_checks.number("strength", strength, 0, 1)
    images_per_prompt = argument_checks.whole(
        "images_per_prompt", images_per_prompt, 1, 4096
    )
    preview_arguments.require_decoder(bundle, preview_decoder, preview)
    # A function that is called after each step is part of the program: the bar is one
    # too.
    preview = progress_bar.checked(preview, progress)
    arguments.require_embeddings(bundle, prompts, "prompts")
    arguments.require_embeddings(bundle, negative_prompts, "negative_prompts")

    # --- what is repainted, the size, and the times of the solver
    edit = inpainting.prepare(
        bundle,
        image,
        mask,
        height=height,
        width=width,
        paste=paste,
        mask_blur=mask_blur,
        mask_padding=mask_padding,
        crop_to_mask=crop_to_mask,
        outpaint=outpaint,
    )
    if edit is not None:
        edit.require_fit(output, control)
        image, mask = edit.image, edit.mask
    image = arguments.starting_image(bundle, image)
    if latents is not None:
        latents = input_images.latents(latents, bundle.part("denoiser").channels)
    start = image if image is not None else latents  # gives the size by default
    shape = arguments.size(bundle, height, width, start)
    solver, times = arguments.settings(
        bundle,
        shape,
        steps=steps,
        solver=solver,
        grid=grid,
        shift=shift,
        mu=mu,
        sigmas=sigmas,
    )
    steering.require_solver(solver)
    control = control_arguments.accepted(control, solver)
    if skipping is not None:
        skipping.require_fit(steering, solver, control=bool(control))
        skipping.require_model(lambda: bundle.unadapted_fingerprint("denoiser"))
    if image is not None:
        # Cut before the rows are made: ControlNets' windows are shares of the steps
        # that are left.
        times = grids.strength(times, strength)

    # --- encode prompts; one row for each image
    cond, uncond = arguments.encoded(
        bundle,
        prompts,
        negative_prompts,
        length=max_sequence_length,
        per_prompt=images_per_prompt,
        clip_skip=clip_skip,
        guided=steering.reads_uncond,
        weighting=prompt_weighting,
        adapters=adapters,
    )
    rows = call_arrays.Rows(cond.pooled.shape[0], images_per_prompt)
    table = call_arrays.adapter_table(bundle, adapters, rows)

    # --- the start: noise, and the image and its mask as latents
    start = call_arrays.start(
        bundle, shape, rows, seed, latents=latents, image=image, mask=mask
    )
    nets, acting = control_arguments.controls_of(
        bundle,
        control,
        times,
        shape,
        rows.count,
        images_per_prompt,
        guided=steering.reads_uncond,
    )
    # The denoiser's mesh: devices that would have no row take tokens.
    mesh = call_arrays.mesh_for(bundle, rows, steering, nets)

    # --- run: the Plan is what compiles, the Inputs are its data
    plan = call_arrays.plan(
        bundle,
        steering,
        solver,
        shape,
        times,
        preview,
        all_latents=all_latents,
        cache=skipping,
    )
    inputs = call_arrays.inputs(
        steering, solver, times, cond, uncond, start, cache=skipping
    )
    plan, previewer = preview_arguments.with_decoder(plan, preview_decoder)
    # The plan is static and the adapted variables lie on the mesh already.
    place = lambda x: compiled.place(x, mesh)
    bar = progress_bar.shown(len(times) - 1, progress)
    with compiled.on(mesh), bar:
        weights = bundle.adapted("denoiser", table), acting
        denoiser, acting = bundle.on_devices(weights)
        if skipping is None:
            rest = nets, place(acting), steering.weak_variables(), previewer
            sampled = compiled.sample(plan, denoiser, place(inputs), *rest)
            record = step_cache.all_computed(len(times) - 1)
        else:
            sampled, record = compiled.sample_cached(
                plan, denoiser, place(inputs), previewer
            )
        sampled = bundle.finished(sampled)
    if cache_report is not None:
        cache_report(record.of_steps(len(times) - 1))
    if output == "latents":
        return sampled
    images = bundle.decode(sampled)
    return images if edit is None else edit.finish(images, bundle.mesh)
