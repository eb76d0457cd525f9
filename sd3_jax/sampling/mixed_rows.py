"""One batch whose rows have steps, solvers, times, guidance and adapters of their own.

    images = mixed_rows.generate(bundle, calls)  # a dict of arguments a row

What differs is data: solvers of one same_program, numbers of plain guidance, seeds,
texts, adapters' weights. A row depends on no other, and its arithmetic is that of
sd3_jax.generate (tests/sampling/test_mixed_rows.py).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jaxtyping import Float

from sd3_jax.diffusion import grids, solvers
from sd3_jax.errors import UserError
from sd3_jax.sampling import (
    argument_checks,
    arguments,
    call_arrays,
    compiled,
    guidance_arguments,
)
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.images import inpainting

EDIT = ("paste", "mask_blur", "mask_padding", "crop_to_mask", "outpaint")


# Not the other multistep solvers: XLA rounds their longer sums otherwise when their
# weights differ by row, and a picture would not be that of sd3_jax.generate.
MIXED = (solvers.ONE_EVALUATION, tuple(solvers.STOCHASTIC))


def can_mix(solver: str, method: str, schedule: str, *, guided: bool) -> bool:
    """Whether pictures with these settings share a batch with others of their kind."""
    # Other methods of guidance read numbers that are one for a batch.
    plain = not guided or (method == "cfg" and schedule == "constant")
    return solvers.same_program(solver) in MIXED and plain


def generate(
    bundle: Bundle,
    calls: Sequence[Mapping[str, Any]],
    *,
    image: Float[np.ndarray, "b h w 3"] | None = None,
    mask: Float[np.ndarray, "b h w"] | None = None,
    edits: Mapping[str, Any] | None = None,
    adapters: Sequence[Mapping[str, float]] | None = None,
    preview: Callable | None = None,
) -> Float[Array, "b height width 3"]:
    """Images (b, height, width, 3) in [0, 1] of calls that differ in data alone.

    `calls` are arguments of sd3_jax.generate for one prompt each, among them `strength`
    with an `image`; `edits` are those of EDIT. `adapters` is a set for each row.
    UserError for calls that need different programs.
    """
    # Sizes are equal in all calls, since the batch has one shape.
    head = calls[0]
    steerings = [_steering(bundle, call) for call in calls]
    size = dict(height=head["height"], width=head["width"])
    edit = inpainting.prepare(bundle, image, mask, **size, **(edits or {}))
    if edit is not None:
        image, mask = edit.image, edit.mask
    image = arguments.starting_image(bundle, image)
    shape = arguments.size(bundle, head["height"], head["width"], image)
    schedules = [_schedule(bundle, shape, call, image is not None) for call in calls]
    _require_one_program(steerings, [solver for solver, _ in schedules])

    # --- texts, adapters, and where sampling starts
    sets = None if adapters is None else list(adapters)
    # _require_one_program has made sure that all rows agree on it.
    guided = steerings[0].reads_uncond
    cond, uncond = _encoded(bundle, calls, guided=guided, adapters=sets)
    rows = call_arrays.Rows(len(calls), 1)
    table = call_arrays.adapter_table(bundle, sets, rows)
    seeds = [seed for call in calls for seed in call["seed"]]
    start = call_arrays.start(
        bundle, shape, rows, seeds, latents=None, image=image, mask=mask
    )
    # --- one program for all rows
    solver, times = schedules[0]
    plan = call_arrays.plan(
        bundle, steerings[0], solver, shape, times, preview, all_latents=False
    )
    inputs = _stacked(
        [
            call_arrays.inputs(steering, solver, times, cond, uncond, start)
            for steering, (solver, times) in zip(steerings, schedules)
        ]
    )
    # Devices that would have no row take tokens, as in sd3_jax.generate.
    mesh = call_arrays.mesh_for(bundle, rows, steerings[0], ())
    with compiled.on(mesh):
        denoiser = bundle.on_devices(bundle.adapted("denoiser", table))
        latents = compiled.sample(plan, denoiser, compiled.place(inputs, mesh))
        latents = bundle.finished(latents)
    images = bundle.decode(latents)
    return images if edit is None else edit.finish(images, bundle.mesh)


def _steering(bundle: Bundle, call: Mapping[str, Any]) -> guidance_arguments.Guidance:
    names = ("skip_layers", "skip_scale", "skip_start", "skip_stop")
    return guidance_arguments.checked(
        bundle.part("denoiser").depth,
        scale=call["guidance"],
        interval=call["guidance_interval"],
        rescale=call["guidance_rescale"],
        skip=guidance_arguments.Layers(*(call[name] for name in names)),
        negative=arguments.has_text(call["negative_prompts"]),
    )


def _require_one_program(
    steerings: Sequence[guidance_arguments.Guidance], names: Sequence[str]
) -> None:
    for steering, solver in zip(steerings, names):
        steering.require_solver(solver)
    families = {solvers.same_program(solver) for solver in names}
    plans = {repr(sorted(x.plan().items(), key=str)) for x in steerings}
    if len(plans) != 1 or len(families) != 1 or min(families) not in MIXED:
        raise UserError(
            "rows of one batch need programs that differ; sample them apart"
        )


def _encoded(
    bundle: Bundle,
    calls: Sequence[Mapping[str, Any]],
    *,
    guided: bool,
    adapters: list | None,
) -> tuple:
    # One encoder's program for the batch: what is not data is that of the first call.
    head = calls[0]
    return arguments.encoded(
        bundle,
        [text for call in calls for text in call["prompts"]],
        [text for call in calls for text in call["negative_prompts"]],
        length=head["max_sequence_length"],
        per_prompt=1,
        clip_skip=head["clip_skip"],
        guided=guided,
        weighting=head["prompt_weighting"],
        adapters=adapters,
    )


def _schedule(
    bundle: Bundle, shape: tuple, call: Mapping[str, Any], changes: bool
) -> tuple[str, Float[np.ndarray, " n"]]:
    # A request cannot name mu or sigmas.
    names = ("steps", "solver", "grid", "shift")
    options = {name: call[name] for name in names}
    solver, times = arguments.settings(bundle, shape, **options, mu=None, sigmas=None)
    if changes:
        strength = argument_checks.number("strength", call["strength"], 0, 1)
        times = grids.strength(times, strength)
    return solver, times


def _stacked(rows: Sequence[compiled.Inputs]) -> compiled.Inputs:
    """Inputs whose numbers are (b,) and whose grid is (b, n); arrays are shared."""
    shared = ("keys", "cond", "uncond", "noise", "x0", "mask")
    # Set to None, which is an empty subtree: np.stack sees the numbers alone.
    numbers = [row._replace(**dict.fromkeys(shared)) for row in rows]
    # Grids of more than GRID_STEPS steps are padded to the longest: another program,
    # as it is for one such call.
    longest = max(len(row.grid) for row in rows)
    pad = lambda grid: np.pad(grid, (0, longest - len(grid)))
    numbers = [row._replace(grid=pad(row.grid)) for row in numbers]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *numbers)
    return stacked._replace(**{name: getattr(rows[0], name) for name in shared})
