"""Paint captions as config.sample says, with a run's weights or with released ones.

`sampler_for` chooses `TrainedSampler`, whose program is jitted in this file, or
`sample_tasks`, which goes through sd3_jax.generate.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures, tree
from sd3_jax.assembly import encoder_identity, examples, model_parts
from sd3_jax.data import tokenizers
from sd3_jax.diffusion import guidance, solvers
from sd3_jax.diffusion.solvers import Grid, Integer
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models import step_cache
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling import cache_arguments, compiled, guidance_arguments
from sd3_jax.sampling.generate import generate_with_state
from sd3_jax.sampling.job import prompt_file
from sd3_jax.sampling.job.released_sampler import Report, sample_tasks
from sd3_jax.sampling.job.row_batches import batch_size, in_programs
from sd3_jax.sampling.job.task_arguments import (
    cache_options,
    guidance_options,
    solver_options,
)
from sd3_jax.sampling.schedulers.scheduler import PUBLISHED
from sd3_jax.sampling.text import prompts
from sd3_jax.sampling.text.encoder import Encoder

SampleCaptions = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def sampler_for(
    config: ConfigDict, parts: model_parts.Parts | None, mesh: Mesh, params: Any
) -> SampleCaptions:
    """sample(captions, numbers) -> u8 (n, h, w, 3), as config.sample and image say.

    `params` are a run's, of these `parts`, or the Bundle that config.weights names
    (released_sampler.load); then `parts` may be None. Picture i is drawn from noise
    `numbers[i]` of config.sample.seed and does not depend on the rest of the batch.
    Every process makes the same calls and gets all pictures.
    """
    if isinstance(params, bundles.Bundle):
        return functools.partial(_sample_released, config, mesh, params)
    return functools.partial(TrainedSampler(config, parts, mesh), params)


def _sample_released(
    config: ConfigDict,
    mesh: Mesh,
    bundle: bundles.Bundle,
    captions: Sequence[str],
    numbers: Sequence[int],
) -> np.ndarray:
    tasks = [
        prompt_file.task(config, caption, number)
        for caption, number in zip(captions, numbers)
    ]
    sample_rows = lambda rows: sample_tasks(bundle, [tasks[i] for i in rows])
    size = batch_size(len(tasks), config.sample.batch_size, mesh, spread=True)
    return in_programs(sample_rows, len(tasks), size)


class TrainedSampler:
    """Pictures of captions by a run's parameters; compiled once for each batch size.

    A recipe that trains on encoded text and latents needs config.encode.weights, a
    released model that encodes the captions and decodes the pictures. `guide` are the
    parameters of a weaker run, for autoguidance.
    """

    def __init__(
        self,
        config: ConfigDict,
        parts: model_parts.Parts,
        mesh: Mesh,
        encoder: Encoder | None = None,
        guide: dict | None = None,
        report: Report = cache_arguments.log_report,
    ):
        self.config, self.parts, self.mesh = config, parts, mesh
        net = parts.denoiser
        sharding.require_context(net.context_attention, net.num_heads, mesh)
        # Assigned over the cached property below: the encoder is shared, not loaded
        # again.
        if encoder is not None:
            self.encoder = encoder
        self.guidance = guidance_arguments.checked(
            parts.denoiser.depth,
            **guidance_options(config.sample),
            guide=guide if config.sample.guidance_method == "autoguidance" else None,
        )
        self.guidance.require_solver(self.solver_and_grid[0])
        if self.guidance.layers.layers and not isinstance(parts.denoiser, MMDiT):
            raise UserError(
                f'config.sample.guidance_method = "{self.guidance.method}": expected'
                " config.model.name = mmdit, whose attention it changes"
            )
        self.cache = cache_arguments.checked(
            parts.denoiser.depth, *cache_options(config.sample).values()
        )
        if self.cache is not None:
            self.cache.require_fit(self.guidance, self.solver_and_grid[0])
            if not isinstance(parts.denoiser, MMDiT):
                raise UserError(
                    f'config.sample.cache = "{config.sample.cache}": expected'
                    " config.model.name = mmdit, whose blocks it skips"
                )
        self.report = report
        self.program = jax.jit(self.sample_batch)

    def __call__(
        self, params: dict, captions: Sequence[str], numbers: Sequence[int]
    ) -> np.ndarray:
        """u8 (n, h, w, 3); picture i is drawn from noise `numbers[i]` of the seed.

        The same caption and number give the same picture in whatever company.
        """

        def sample_rows(rows):
            batch = self.tokens([captions[i] for i in rows])
            batch["number"] = np.array([numbers[i] for i in rows], np.uint32)
            batch = self.put(batch, len(rows))
            guide = self.guidance.guide
            images = self.program(params, batch, self.negative, self.times, guide)
            if self.cache is not None:
                images, record = images
                self.report(record.of_steps(int(self.times["steps"])))
            # Latents are decoded by the encoder's model in a second program: the
            # recipe's own program has no autoencoder.
            if self.encoder is not None:
                images = 2 * self.encoder.bundle.decode(images) - 1  # to [-1, 1]
            return multihost_utils.process_allgather(images, tiled=True)

        if self.cache is not None:
            self.cache.require_model(lambda: tree.fingerprint(params["denoiser"]))
        size = batch_size(len(captions), self.config.sample.batch_size, self.mesh)
        return pictures.to_uint8(in_programs(sample_rows, len(captions), size))

    @functools.cached_property
    def encoder(self) -> Encoder | None:
        """Encodes captions and decodes latents where the recipe does neither itself."""
        require_text_encoders(self.config)
        if self.config.text.name == "bytes":
            return None
        parts = ["vae", *bundles.TEXT]
        encoder = examples.encoder(self.config, self.mesh, parts)
        if trained_with := self.parts.encoders:  # fingerprints read all weights
            prints = encoder.bundle.fingerprints()
            encoder_identity.warn(self.config, trained_with, prints)
        return encoder

    @functools.cached_property
    def negative(self) -> dict[str, jax.Array]:
        """The negative prompt, a row for every shard; {} if there is none to use."""
        if not self.config.sample.negative or not self.guidance.guided:
            return {}
        # One row for each shard: the mesh does not split fewer.
        shards = sharding.batch_shards(self.mesh)
        return self.put(self.tokens([self.config.sample.negative] * shards), shards)

    @property
    def solver_and_grid(self) -> tuple[str, np.ndarray]:
        """The solver and its times t, by default those of the released models."""
        # PUBLISHED shifts by a constant: only a dynamic shift reads the token count.
        settings, tokens = self.config.sample, 0
        return PUBLISHED.sampler(settings.steps, tokens, **solver_options(settings))

    @functools.cached_property
    def times(self) -> dict[str, Any]:
        """Solver, steps and grid as arguments of the program, which serves others."""
        solver, grid = self.solver_and_grid
        grid = np.asarray(self.parts.formulation.grid(grid))
        inputs = compiled.solver_inputs(solver, grid)
        if self.cache is not None:
            inputs["cache"] = self.cache.schedule(len(grid) - 1)
        return compiled.place(inputs | self.guidance_inputs(grid), self.mesh)

    def guidance_inputs(self, grid: np.ndarray) -> dict[str, Any]:
        """What guidance reads of the grid; its other numbers are constants, as cfg."""
        inputs = self.guidance.inputs(grid)
        return {k: inputs[k] for k in ("scales", "skip_window") if k in inputs}

    def tokens(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        if self.encoder is not None:
            return self.encoder.tokenize(captions)
        return tokenizers.bytes_of(captions, self.config.text.length)

    def put(self, batch: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        # Each process holds the whole batch and puts its own rows on the mesh.
        rows = sharding.local_rows(self.mesh, size)
        batch = {name: value[rows] for name, value in batch.items()}
        put = self.encoder or functools.partial(sharding.put, mesh=self.mesh)
        return put(batch, batch_size=size)

    def sample_batch(
        self,
        params: dict,
        batch: dict,
        negative: dict,
        times: dict,
        guide: dict | None = None,
    ) -> jax.Array | tuple[jax.Array, step_cache.Record]:
        """A batch's text and numbers to images in [-1, 1], or latents to decode; with
        a step cache also its record."""
        names = solvers.same_program(self.solver_and_grid[0])
        sides = self.config.image.height, self.config.image.width
        compiled.say_compiling(", ".join(names), len(batch["number"]), *sides)
        solver = solvers.of_program(names, times["solver"])
        rest = {name: x for name, x in times.items() if name != "solver"}
        args = params, batch, negative, solver
        x0, state = self.latents_and_state(*args, **rest, guide=guide)
        decoded = self.encoder is None
        images = self.parts.autoencoder.decode(x0) if decoded else x0
        if state is None:
            return images
        return images, step_cache.Record(state.computed, state.measures)

    def latents(self, *args: Any, **options: Any) -> jax.Array:
        return self.latents_and_state(*args, **options)[0]

    def latents_and_state(
        self,
        params: dict,
        batch: dict,
        negative: dict,
        solver: Callable,
        *,
        grid: Grid,
        steps: Integer | None = None,
        scales: jax.Array | None = None,
        skip_window: tuple[jax.Array, jax.Array] | None = None,
        cache: step_cache.Schedule | None = None,
        guide: dict | None = None,
    ) -> tuple[jax.Array, step_cache.State | None]:
        settings, objective = self.config.sample, self.parts.objective
        seed = jax.random.key(settings.seed)
        # Noise depends on sample.seed and the number, not on the rest of the batch.
        keys = jax.vmap(lambda n: jax.random.fold_in(seed, n))(batch["number"])
        cond = objective.encode(params, batch)
        # The unconditional branch is zeros, as caption dropout leaves in training.
        uncond = prompts.null(cond)
        if negative:
            # Encoded once, on one row for each shard, and repeated for the batch.
            uncond = jax.tree.map(
                lambda u, c: jnp.broadcast_to(u[:1], c.shape),
                objective.encode(params, negative),
                cond,
            )
        steering, scale, weakened = self.guidance, settings.cfg, None
        if scales is not None:
            scale = guidance.Schedule(grid, scales)
        if skip_window is not None:
            layers = dict(skip=steering.layers.layers, skipped=steering.layers.skipped)
            worse = objective.velocity(params, **layers)
            weakened = guidance.Weakened(worse, steering.layers.scale, skip_window)
        velocity = objective.velocity(params)
        if self.cache is not None:
            caching = step_cache.Cache(self.cache.method, cache)
            velocity = objective.velocity(params, cache=caching)
        return generate_with_state(
            velocity,
            keys,
            cond,
            uncond,
            shape=self.parts.shape,
            grid=grid,
            steps=steps,
            spread=self.parts.formulation.spread,
            solver=solver,
            scale=scale,
            method=steering.method,
            options=steering.numbers,
            interval=steering.interval,
            rescale=steering.rescale,
            weakened=weakened,
            weak=None if guide is None else objective.velocity(guide),
        )


def require_text_encoders(config: ConfigDict) -> None:
    """UserError if captions cannot be encoded: no bytes model, no encode.weights."""
    if config.text.name != "bytes" and not config.encode.weights:
        raise UserError(
            f'config.text.name = "{config.text.name}": this recipe reads encoded text,'
            " and prompts need encoders; set config.encode.weights to a released model"
            " that has them, or --config.text.name=bytes"
        )
