"""What paints a batch of rows: released weights, or a checkpoint of a run."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures
from sd3_jax.diffusion import guidance, solvers
from sd3_jax.errors import UserError
from sd3_jax.sampling import compiled, mixed_rows
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.generate import generate
from sd3_jax.sampling.job import (
    line_arrays,
    painters,
    prompt_file,
    released_sampler,
    task_arguments,
)
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.sampling.job.task_arguments import generate_arguments, solver_options
from sd3_jax.sampling.schedulers.scheduler import PUBLISHED
from sd3_jax.serving.request_tasks import Row

Painted = tuple[np.ndarray | None, dict[int, str]]
Preview = Callable[[Any, Any, Any], None]
PIXELS = ("image", "mask")


class Key(NamedTuple):
    """Rows of equal keys share a batch; `program` alone says what is compiled."""

    program: tuple
    shared: tuple
    mixed: bool


class RowPainter(NamedTuple):
    """paint(rows) -> pictures u8, or None; and why rows are not painted, by row.

    Rows of one `key` share a program and so a batch. require(row) raises a UserError
    for what the model cannot do. `facts` are those of every picture's line.
    """

    paint: Callable[[Sequence[Row]], Painted]
    key: Callable[[Row], Key]
    require: Callable[[Row], None]
    facts: dict
    adapters: Mapping[str, float]


# --- released weights


def released(config: ConfigDict, mesh: Mesh, preview: Preview | None) -> RowPainter:
    """config.weights, with config.sample.lora as adapters by name."""
    _require_no_cache(config)
    usual = prompt_file.task(config, "", 0)
    bundle = released_sampler.load_for_sampling(config, mesh, [usual.settings])
    guide = released_sampler.load_guide(config, mesh)
    # By file name: paths of the host are nobody's business.
    files = {
        name: [os.path.basename(x) for x in config.sample[name]]
        for name in ("lora", "embeddings")
    }

    # The checks of a job's lines before it starts, here for each request.
    def require(row: Row) -> None:
        released_sampler.check(bundle.scheduler, bundle.configs, [row.task.settings])

    return RowPainter(
        functools.partial(_paint_released, bundle, guide, preview),
        functools.partial(_key, functools.partial(_solver_of, bundle.scheduler)),
        require,
        painters.released_facts(bundle, guide, files),
        dict(bundle.adapters),
    )


def _require_no_cache(config: ConfigDict) -> None:
    """UserError for a step cache, whose decision is one for all rows of a batch."""
    if config.sample.cache:
        raise UserError(
            f'config.sample.cache = "{config.sample.cache}": serve has no step cache,'
            " because a picture would depend on its company; remove it"
        )


def _solver_of(scheduler: Any, task: Task) -> str:
    """The solver that the model's scheduler takes where a task leaves it open."""
    return scheduler.sampler(1, 1, **solver_options(task.settings))[0]


def _key(solver_of: Callable[[Task], str], row: Row) -> Key:
    """What rows of one batch have in common: what compiles, and what is one for all."""
    s = row.task.settings
    solver, guided = (
        solver_of(row.task),
        guidance.guides(s["cfg"], s["guidance_method"]),
    )
    method, schedule = s["guidance_method"], s["guidance_schedule"]
    sides = s["height"], s["width"]
    # Mixed rows are data of one program, so that requests with other seeds, steps and
    # scales need not wait for each other's batch to end.
    if not mixed_rows.can_mix(solver, method, schedule, guided=guided):
        # sd3_jax.generate paints these; its numbers are one for the whole batch.
        program = (*sides, solver, *task_arguments.program(row.task))
        return Key(program, (*row.task.group, str(row.adapters)), mixed=False)
    pixels = [name for name in PIXELS if name in s]
    # Layers left out (skip-layer guidance) are static in the program; without guidance
    # they are not read.
    skipped = s["skip_layers"] if guided else ()
    program = (*sides, solvers.same_program(solver)[0], guided, *skipped, *pixels)
    # A crop or a blur of the mask is computed once for all rows, before the program.
    edits = tuple(str(s.get(name)) for name in mixed_rows.EDIT)
    return Key(program, (row.task.size, *edits), mixed=True)


def _paint_released(
    bundle: Bundle,
    guide: Bundle | None,
    preview: Preview | None,
    rows: Sequence[Row],
) -> Painted:
    tasks = [row.task for row in rows]
    sets = [row.adapters or {} for row in rows] if bundle.adapters else None
    scheduler = functools.partial(_solver_of, bundle.scheduler)
    if not _key(scheduler, rows[0]).mixed:
        usual = sets[0] if sets else None
        return released_sampler.sample_lines(bundle, {}, guide, tasks, adapters=usual)
    settings, pixels = tasks[0].settings, {}
    if any(name in settings for name in PIXELS):
        edit_rows = [line_arrays.read_checked_row(x.settings, x.size) for x in tasks]
        pixels = line_arrays.arguments(settings, edit_rows, {})
    calls = [
        generate_arguments([task]) | {"strength": task.settings.get("strength")}
        for task in tasks
    ]
    images = mixed_rows.generate(
        bundle,
        calls,
        image=pixels.get("image"),
        mask=pixels.get("mask"),
        edits={name: pixels[name] for name in mixed_rows.EDIT if name in pixels},
        adapters=sets,
        preview=preview,
    )
    # Every process gets all pictures; process 0 answers with them.
    images = multihost_utils.process_allgather(images, tiled=True)
    return _finished(np.array(images, np.float32))


def _finished(images: np.ndarray) -> Painted:
    """Bytes of pictures in [0, 1]; a row with NaN is a failure."""
    # NaN casts to any integer without an error: a black picture would be delivered.
    lost = np.isnan(images).any(axis=(1, 2, 3))
    reason = "the pixels are NaN, because numbers overflow; lower the guidance"
    failures = {int(i): reason for i in np.flatnonzero(lost)}
    return pictures.to_uint8(2 * np.nan_to_num(images) - 1), failures


# --- a checkpoint of a run


def trained(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh, preview: Preview | None
) -> RowPainter:
    """The newest checkpoint of the run in `workdir`."""
    _require_no_cache(config)
    run = painters.trained_run(config, workdir, mesh)
    samplers: dict[tuple, RowSampler] = {}

    def paint(rows: Sequence[Row]) -> Painted:
        program = key(rows[0]).program
        # Kept for the life of the server. Each has its own jitted function, whose cache
        # would be lost with it.
        if program not in samplers:
            row_config = rows[0].task.config
            samplers[program] = RowSampler(
                row_config, run.parts_of(row_config), mesh, run.encoder, preview=preview
            )
        return samplers[program].paint(run.params, rows)

    key = functools.partial(_key, lambda task: _solver_of(PUBLISHED, task))

    def require(row: Row) -> None:
        if not key(row).mixed:
            names = ", ".join(name for names in mixed_rows.MIXED for name in names)
            raise UserError(
                f"solver {_solver_of(PUBLISHED, row.task)}: a checkpoint is served with"
                f" {names} and plain guidance; `convert` exports it for the others"
            )

    require(Row(prompt_file.task(config, "", 0)))
    return RowPainter(paint, key, require, run.facts, {})


class RowSampler(TrainedSampler):
    """A TrainedSampler whose rows have seeds, times and guidance of their own."""

    def __init__(self, *args: Any, preview: Preview | None = None):
        super().__init__(*args)
        self.preview = preview

    def paint(self, params: dict, rows: Sequence[Row]) -> Painted:
        tasks = [row.task for row in rows]
        negatives = [task.settings["negative"] for task in tasks]
        count = len(tasks)
        text = self.put(self.tokens([task.caption for task in tasks]), count)
        negative = self.put(self.tokens(negatives), count)
        numbers = compiled.place(self.numbers(tasks), self.mesh)
        images = self.program(params, text, negative, numbers)
        if self.encoder is not None:
            # Latents of a released autoencoder: decode gives [0, 1], a run's own gives
            # [-1, 1].
            images = 2 * self.encoder.bundle.decode(images) - 1
        images = multihost_utils.process_allgather(images, tiled=True)
        return _finished((np.array(images, np.float32) + 1) / 2)

    def numbers(self, tasks: Sequence[Task]) -> dict[str, Any]:
        """What differs by row, (b,) or (b, n)."""
        rows = []
        for task in tasks:
            s = task.settings
            # PUBLISHED shifts by a constant: only a dynamic shift reads tokens.
            solver, grid = PUBLISHED.sampler(s["steps"], 0, **solver_options(s))
            # As in `sample`, the published grid is scaled to the last time that the run
            # trained at.
            grid = np.asarray(self.parts.formulation.grid(grid))
            numbers = dict(
                seed=np.uint32(s["seed"]),
                number=np.uint32(task.number),
                scale=np.float32(s["cfg"]),
                low=np.float32(s["cfg_start"]),
                high=np.float32(s["cfg_stop"]),
                rescale=np.float32(s["rescale"]),
                negative=np.bool_(s["negative"]),
            )
            rows.append(numbers | compiled.solver_inputs(solver, grid))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)

    def sample_batch(
        self, params: dict, batch: dict, negative: dict, numbers: dict
    ) -> jax.Array:
        """Images in [-1, 1] of a batch's texts and numbers, or latents to decode."""
        names = solvers.same_program(self.solver_and_grid[0])
        count = len(numbers["seed"])
        sides = self.config.image.height, self.config.image.width
        compiled.say_compiling(", ".join(names), count, *sides)
        objective = self.parts.objective
        cond = objective.encode(params, batch)
        # Without a negative prompt: zeros, as caption dropout leaves in training.
        steer = lambda u, c: jnp.where(
            numbers["negative"].reshape(-1, *[1] * (c.ndim - 1)), u, jnp.zeros_like(c)
        )
        uncond = cond
        if self.guidance.guided:
            uncond = jax.tree.map(steer, objective.encode(params, negative), cond)
        # As TrainedSampler derives them: `sample` paints the same picture from a seed.
        key = lambda seed, number: jax.random.fold_in(jax.random.key(seed), number)
        x0 = generate(
            objective.velocity(params),
            jax.vmap(key)(numbers["seed"], numbers["number"]),
            cond,
            uncond,
            shape=self.parts.shape,
            grid=numbers["grid"],
            steps=numbers["steps"],
            spread=self.parts.formulation.spread,
            solver=solvers.of_program(names, numbers["solver"]),
            scale=numbers["scale"] if self.guidance.guided else 1.0,
            interval=(numbers["low"], numbers["high"]),
            rescale=numbers["rescale"],
            preview=self.preview,
        )
        return x0 if self.encoder is not None else self.parts.autoencoder.decode(x0)
