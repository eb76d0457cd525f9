"""What `import sd3_jax` offers: load a released model, make pictures, look inside.

    bundle = sd3_jax.load("sd3.5_medium/", dtype="bfloat16")
    images = sd3_jax.generate(bundle, ["a red fox"], height=1024, width=1024)

Arrays are NHWC; latents are scaled and shifted, t is in [0, 1] and 1 is noise; images
are float in [0, 1], and given ones may be bytes or PIL images
(sampling/input_images.py).
"""

import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from sd3_jax.diffusion import grids, solvers
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import (
    argument_checks,
    arguments,
    bundle_loading,
    compiled,
    control_arguments,
    masks,
    seeds,
)
from sd3_jax.sampling.arguments import Texts
from sd3_jax.sampling.bundle import Bundle, ControlBundle, Prompt
from sd3_jax.sampling.control_arguments import ControlInput
from sd3_jax.sampling.export import save
from sd3_jax.sampling.input_images import Pictures

__all__ = ["Bundle", "ControlBundle", "ControlInput", "Prompt"]
__all__ += ["generate", "load", "load_control", "save"]
OUTPUTS = ("images", "latents")


def load(
    path_or_hub_name: str | os.PathLike | Sequence[str | os.PathLike],
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    tokenizers_from: str | None = "",
    lora: Any = (),
    quantize: Mapping[str, str] = MappingProxyType({}),
) -> Bundle:
    """A released model, sharded over `mesh` as it streams in; all devices by default.

    See sampling.bundle_loading.load for what may be named. An error lists what is
    missing, extra or of another shape.

    `lora` names LoRA files or folders of diffusers, PEFT or kohya, each with a weight
    if one ends in it: "style.safetensors=0.8", or {path: weight} for several.
    `quantize` keeps matrices of the denoiser, of T5 or of both in eight bits:
    {"denoiser": "int8", "t5": "fp8"}.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    return bundle_loading.load(
        path_or_hub_name,
        mesh=mesh,
        dtype=dtype,
        tokenizers_from=tokenizers_from,
        lora=lora,
        quantize=quantize,
    )


def load_control(path_or_hub_name: str | os.PathLike, bundle: Bundle) -> ControlBundle:
    """A ControlNet of either style: a diffusers folder or one .safetensors file."""
    return bundle_loading.load_control(path_or_hub_name, bundle)


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
    output: str = "images",
) -> Float[Array, "b _ _ _"]:
    """Pictures (b, height, width, 3) in [0, 1], or their latents; p0, p0, p1, p1, …

    The seed alone decides a picture's noise, whatever its prompt, given as a text or as
    what encode_prompts gives. Of one `seed` all pictures of the call are numbered, and
    picture i has the noise of (seed, i); of a seed for each prompt they are numbered
    within `images_per_prompt`, so a row is what it is alone. `latents` are noise of
    your own instead.

    A `guidance` of 1 or less is none, one pass of the network a step: then negative
    prompts, `skip_layers` and the other options of guidance are not used, and a warning
    says so. `image`, in [0, 1] or as latents, is changed for the last `strength` of the
    steps; with a `mask` only where that is 1. `skip_layers` are left out of a third
    velocity, which is steered away from at the steps i of n with n skip_start < i < n
    skip_stop.

    The solver and the t's are those of the scheduler that came with the model; `solver`
    and `grid`, `shift`, `mu` (the shift's logarithm) or `sigmas`, which are shifted as
    well and whose number is that of the steps, replace them. `preview(i, t, rgb)` sees
    a rough picture after each step; a program is compiled for each such function.
    """
    argument_checks.choice("output", output, OUTPUTS)
    guidance = argument_checks.number("guidance", guidance)
    guidance_interval = argument_checks.pair("guidance_interval", guidance_interval)
    guidance_rescale = argument_checks.number(
        "guidance_rescale", guidance_rescale, 0, 1
    )
    strength = argument_checks.number("strength", strength, 0, 1)
    images_per_prompt = argument_checks.whole(
        "images_per_prompt", images_per_prompt, 1, 4096
    )
    skip_layers = arguments.layers(bundle, skip_layers)
    skip_scale = argument_checks.number("skip_scale", skip_scale)
    if preview is not None and not callable(preview):
        raise UserError(f"preview {preview!r}: wanted a function (step, t, rgb)")
    guided = arguments.guided(
        guidance,
        guidance_interval,
        guidance_rescale,
        negative_prompts=arguments.has_text(negative_prompts),
        skip_layers=bool(skip_layers),
    )
    image = arguments.starting_image(bundle, image)
    latents = arguments.starting_latents(bundle, latents)
    arguments.require_embeddings(bundle, prompts, "prompts")
    arguments.require_embeddings(bundle, negative_prompts, "negative_prompts")
    given = image if image is not None else latents
    shape = arguments.size(bundle, height, width, given)
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
    spread = lambda x, what: arguments.rows_of(x, rows, images_per_prompt, what)
    noise_keys, image_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(
        seeds.image_keys(rows // images_per_prompt, seed, images_per_prompt)
    )
    noise = x0 = None
    if latents is not None:
        noise = arguments.latents_of(bundle, spread(latents, "latents"), None, shape)
    if mask is not None:
        if image is None:
            raise UserError("mask without image: wanted both, the picture to repaint")
        mask = spread(masks.latent_mask(mask, shape, bundle.factor), "mask")
    if image is not None:
        times = grids.strength(times, strength)
        x0 = arguments.latents_of(bundle, spread(image, "image"), image_keys, shape)
    skipped = skip_layers if guided else ()
    draws = solvers.draws(solvers.SOLVERS[solver])
    inputs = compiled.Inputs(
        keys=noise_keys if noise is None or draws else None,
        cond=cond,
        uncond=uncond,
        grid=times,
        scale=np.float32(guidance),
        interval=tuple(map(np.float32, guidance_interval)),
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
        bundle.part("denoiser"), solver, shape, guided, skipped, preview
    )
    control = [control] if isinstance(control, ControlInput) else list(control or ())
    nets, acting = control_arguments.controls_of(
        bundle, control, times, shape, rows, images_per_prompt
    )
    place = lambda x: compiled.place(x, bundle.mesh)
    with compiled.on(bundle.mesh):
        latents = compiled.sample(
            plan, bundle.variables["denoiser"], place(inputs), nets, place(acting)
        )
    return latents if output == "latents" else bundle.decode(latents)
