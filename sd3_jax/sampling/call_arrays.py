"""What one call of sd3_jax.generate gives its program: rows, start, Plan, Inputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Key

from sd3_jax.diffusion import solvers
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.sampling import argument_checks, arguments, compiled, seeds
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.cache_arguments import StepCache
from sd3_jax.sampling.guidance_arguments import Guidance
from sd3_jax.sampling.images import input_images
from sd3_jax.sampling.text.prompts import Conditioning

OUTPUTS = ("images", "latents")
RETURN_LATENTS = ("last", "all")


class Rows(NamedTuple):
    """The images of a call: p0, p0, p1, p1, ... for two of each prompt."""

    count: int
    per_prompt: int

    @property
    def prompts(self) -> int:
        return self.count // self.per_prompt


class Start(NamedTuple):
    """Where sampling starts, one row for each image; a field that is None is absent."""

    noise_keys: Key[Array, " b"]
    noise: Float[Array, "b h w c"] | None
    x0: Float[Array, "b h w c"] | None
    mask: Any


def mesh_for(
    bundle: Bundle, rows: Rows, steering: Guidance, nets: Sequence[nn.Module]
) -> Mesh:
    """The bundle's mesh for the denoiser's rows (sharding.spread), its ControlNets and
    its guide; UserError if the heads of one do not fit it."""
    mesh = sharding.spread(bundle.mesh, rows.count * (1 + steering.reads_uncond))
    guides = [x.part("denoiser") for x in (steering.guide,) if x is not None]
    for net in (bundle.part("denoiser"), *nets, *guides):
        sharding.require_context(net.context_attention, net.num_heads, mesh)
    return mesh


def returns_all(output: Any, return_latents: Any) -> bool:
    """Whether the latents of all steps are returned; UserError for unknown choices."""
    argument_checks.choice("output", output, OUTPUTS)
    argument_checks.choice("return_latents", return_latents, RETURN_LATENTS)
    if return_latents == "all" and output != "latents":
        raise UserError('return_latents "all" returns no images; set output="latents"')
    return return_latents == "all"


def start(
    bundle: Bundle,
    shape: tuple[int, int, int],
    rows: Rows,
    seed: Any,
    *,
    latents: Array | np.ndarray | None,
    image: Array | np.ndarray | None,
    mask: Any,
) -> Start:
    """The keys, noise, image and mask of the rows, as latents (h, w, c) each.

    `latents` are the noise. `image` is in pixels or latents, `mask` in pixels.
    """
    keys = seeds.image_keys(rows.prompts, seed, rows.per_prompt)
    # Two keys for each image: the autoencoder's posterior is drawn with another one
    # than the noise, so that the noise is that of the seed with an image and without.
    noise_keys, image_keys = jax.vmap(lambda k: tuple(jax.random.split(k)))(keys)
    spread = lambda x, name: argument_checks.rows_of(x, *rows, name)
    noise = x0 = None
    if latents is not None:
        noise = arguments.latents_of(bundle, spread(latents, "latents"), None, shape)
    # A mask alone has nothing to keep: without an image the rest would be noise.
    if mask is not None:
        if image is None:
            raise UserError(
                "mask without image; give image too, the picture to repaint"
            )
        mask = spread(input_images.latent_mask(mask, shape, bundle.factor), "mask")
    if image is not None:
        x0 = arguments.latents_of(bundle, spread(image, "image"), image_keys, shape)
    return Start(noise_keys, noise, x0, mask)


def adapter_table(
    bundle: Bundle, adapters: Any, rows: Rows
) -> Float[np.ndarray, "..."]:
    """Weights of the bundle's n adapters: (n,), or (b, n) for a set for each prompt."""
    table = bundle.bank.table(adapters, rows.prompts)
    # A program takes one set for all rows or one for each, and not one for each prompt.
    return np.repeat(table, rows.per_prompt, axis=0) if table.ndim == 2 else table


def plan(
    bundle: Bundle,
    steering: Guidance,
    solver: str,
    shape: tuple[int, int, int],
    times: Float[np.ndarray, " n"],
    preview: Callable | None,
    *,
    all_latents: bool,
    cache: StepCache | None = None,
) -> compiled.Plan:
    """What a program is compiled for."""
    return compiled.Plan(
        bundle.part("denoiser"),
        # The shared program has no trajectory.
        (solver,) if all_latents else solvers.same_program(solver),
        shape,
        preview=preview,
        factor=bundle.factor,
        trajectory=len(times) - 1 if all_latents else None,
        cache=None if cache is None else cache.method,
        **steering.plan(),
    )


def inputs(
    steering: Guidance,
    solver: str,
    times: Float[np.ndarray, " n"],
    cond: Conditioning,
    uncond: Conditioning,
    start: Start,
    *,
    cache: StepCache | None = None,
) -> compiled.Inputs:
    """What a program reads: numbers and arrays, which compile nothing."""
    # Noise that the caller gives needs no key, unless the solver draws more of it.
    draws = solvers.draws(solvers.SOLVERS[solver])
    return compiled.Inputs(
        keys=start.noise_keys if start.noise is None or draws else None,
        cond=cond,
        uncond=uncond,
        **compiled.solver_inputs(solver, times),
        **steering.inputs(times),
        noise=start.noise,
        x0=start.x0,
        mask=start.mask,
        cache=None if cache is None else cache.schedule(len(times) - 1),
    )
