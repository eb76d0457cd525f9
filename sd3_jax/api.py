"""The public API: load a released model, generate images, inspect the model.

    bundle = sd3_jax.load("sd3.5_medium/", dtype="bfloat16")
    images = sd3_jax.generate(bundle, ["a red fox"], height=1024, width=1024)

Arrays are NHWC. Latents are shifted and scaled. t is in [0, 1], and 1 is noise. Images
are floats in [0, 1]; inputs may also be bytes or PIL images (sampling/input_images.py).
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from sd3_jax.diffusion import grids, solvers
from sd3_jax.errors import UserError
from sd3_jax.sampling import (
    argument_checks,
    arguments,
    compiled,
    control_arguments,
    input_images,
    progress_bar,
    seeds,
)
from sd3_jax.sampling.arguments import Texts
from sd3_jax.sampling.bundle import Bundle, Prompt
from sd3_jax.sampling.bundle_loading import load, load_control
from sd3_jax.sampling.control import ControlBundle, ControlInput
from sd3_jax.sampling.export import save
from sd3_jax.sampling.input_images import Pictures

__all__ = ["Bundle", "ControlBundle", "ControlInput", "Prompt"]
__all__ += ["generate", "load", "load_control", "save"]
OUTPUTS = ("images", "latents")
RETURN_LATENTS = ("last", "all")


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
    control: ControlInput | Sequence[ControlInput] | None = None,
    skip_layers: Sequence[int] | None = None,
    skip_scale: float = 2.8,
    skip_start: float = 0.01,
    skip_stop: float = 0.2,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    grid: str | None = None,
    shift: float | None = None,
    mu: float | None = None,
    sigmas: Sequence[float] | np.ndarray | None = None,
    clip_skip: int = 0,
    preview: Callable[[int, float, np.ndarray], None] | None = None,
    progress: bool = False,
    output: str = "images",
    return_latents: str = "last",
) -> Float[Array, "*n b _ _ _"]:
    """Generate images (b, height, width, 3) in [0, 1], or their latents.

    With `output="latents"` and `return_latents="all"` the latents are (steps + 1, b, h,
    w, c), at each time from the noise, or the noised image, to the result.

    Rows are in the order p0, p0, p1, p1, ... for `images_per_prompt` of 2. Prompts are
    texts, or what encode_prompts returns.

    The noise depends on the seed alone, not on the prompt. With one `seed`, image i of
    the call has the noise of (seed, i). With a seed for each prompt, images count from
    0 within each prompt, so that a row does not depend on the other rows. `latents`
    replace the noise.

    A `guidance` of 1 or less means none: one pass of the network per step. A warning
    says so if negative prompts, `skip_layers` or other options of guidance are given.
    `image`, in [0, 1] or as latents, is changed over the last `strength` of the steps,
    with a `mask` only where that is 1. `skip_layers` are left out of a third velocity,
    from which guidance steers away in steps i of n with n skip_start < i < n skip_stop.

    The model's scheduler decides the solver and the t's, unless `solver`, `grid`,
    `shift`, `mu` (the logarithm of the shift) or `sigmas` do; `sigmas` are shifted as
    well, and their number is the number of steps. `preview(i, t, rgb)` is called with a
    rough image after each step.

    The first call compiles a program, and one line says so. Another call compiles again
    if it changes the size or number of images, the text's length, whether there is
    guidance, which inputs are given, `skip_layers`, the ControlNets, or the `preview`
    function, and with `return_latents="all"` the number of steps. Numbers are data:
    seed, `guidance`, `strength`, `sigmas`, `shift`, and up to 1,024 `steps`. The
    solvers euler, dpmpp_2m and dpmpp_2m_flow share a program; heun and lcm have their
    own.

    `progress` shows a bar over the steps (tqdm). Calls with and without it compile two
    programs.

    Raises UserError for arguments of wrong types or out of range.
    """
    # --- check the arguments
    argument_checks.choice("output", output, OUTPUTS)
    argument_checks.choice("return_latents", return_latents, RETURN_LATENTS)
    if (all_latents := return_latents == "all") and output != "latents":
        raise UserError('return_latents "all" returns no images; set output="latents"')
    guidance = argument_checks.number("guidance", guidance)
    guidance_interval = argument_checks.pair("guidance_interval", guidance_interval)
    low, high = guidance_interval
    guidance_rescale = argument_checks.number(
        "guidance_rescale", guidance_rescale, 0, 1
    )
    strength = argument_checks.number("strength", strength, 0, 1)
    images_per_prompt = argument_checks.whole(
        "images_per_prompt", images_per_prompt, 1, 4096
    )
    depth = bundle.part("denoiser").depth
    # Sorted, since equal sets are to be one program.
    skip_layers = tuple(sorted({*argument_checks.skip_layers(skip_layers, depth)}))
    skip_scale = argument_checks.number("skip_scale", skip_scale)
    if preview is not None and not callable(preview):
        raise UserError(f"preview {preview!r}: expected a function of (step, t, rgb)")
    if progress:
        preview = progress_bar.counted(preview)
    guided = arguments.guided(
        guidance,
        guidance_interval,
        guidance_rescale,
        negative_prompts=arguments.has_text(negative_prompts),
        skip_layers=bool(skip_layers),
    )
    image = arguments.starting_image(bundle, image)
    if latents is not None:
        latents = input_images.latents(latents, bundle.part("denoiser").channels)
    arguments.require_embeddings(bundle, prompts, "prompts")
    arguments.require_embeddings(bundle, negative_prompts, "negative_prompts")
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
    # --- encode prompts; one row for each image
    cond, uncond = arguments.encoded(
        bundle,
        prompts,
        negative_prompts,
        length=max_sequence_length,
        per_prompt=images_per_prompt,
        clip_skip=clip_skip,
        guided=guided,
    )
    rows = cond.pooled.shape[0]
    spread = lambda x, name: argument_checks.rows_of(x, rows, images_per_prompt, name)
    noise_keys, image_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(
        seeds.image_keys(rows // images_per_prompt, seed, images_per_prompt)
    )
    # --- noise, starting image and mask as latents
    noise = x0 = None
    if latents is not None:
        noise = arguments.latents_of(bundle, spread(latents, "latents"), None, shape)
    if mask is not None:
        if image is None:
            raise UserError(
                "mask without image; give image too, the picture to repaint"
            )
        mask = input_images.latent_mask(mask, shape, bundle.factor)
        mask = spread(mask, "mask")
    if image is not None:
        times = grids.strength(times, strength)
        x0 = arguments.latents_of(bundle, spread(image, "image"), image_keys, shape)
    # --- numbers are data of the compiled program, the Plan is what compiles
    skipped = skip_layers if guided else ()
    draws = solvers.draws(solvers.SOLVERS[solver])
    inputs = compiled.Inputs(
        keys=noise_keys if noise is None or draws else None,
        cond=cond,
        uncond=uncond,
        **compiled.solver_inputs(solver, times),
        scale=np.float32(guidance),
        interval=(np.float32(low), np.float32(high)),
        rescale=np.float32(guidance_rescale),
        skip_scale=np.float32(skip_scale) if skipped else None,
        skip_window=grids.skip_window(times, skip_start, skip_stop)
        if skipped
        else None,
        noise=noise,
        x0=x0,
        mask=mask,
    )
    plan = compiled.Plan(
        bundle.part("denoiser"),
        # The shared program has no trajectory.
        (solver,) if all_latents else solvers.same_program(solver),
        shape,
        guided,
        skipped,
        preview,
        bundle.factor,
        trajectory=len(times) - 1 if all_latents else None,
    )
    control = control_arguments.listed(control)
    nets, acting = control_arguments.controls_of(
        bundle, control, times, shape, rows, images_per_prompt, guided=guided
    )
    # --- run
    place = lambda x: compiled.place(x, bundle.mesh)
    bar = progress_bar.shown(len(times) - 1, progress)
    with compiled.on(bundle.mesh), bar:
        sampled = compiled.sample(
            plan, bundle.variables["denoiser"], place(inputs), nets, place(acting)
        )
    return sampled if output == "latents" else bundle.decode(sampled)
