"""Prompts to pictures by one compiled program, for sample, train and evaluate."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures, sharding, watch
from sd3_jax.diffusion import grids
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.jobs import assemble
from sd3_jax.pipelines import prompts
from sd3_jax.pipelines.generate import generate


def batch_size(n: int, most: int, mesh: Mesh) -> int:
    """For n pictures: at most `most`, and enough to give every shard a row."""
    shards = sharding.batch_shards(mesh)
    return min(max(shards, most // shards * shards), -(-n // shards) * shards)


class Painter:
    """Pictures of prompts as config.sample says; compiled once for a batch size."""

    def __init__(self, config: ConfigDict, parts: assemble.Parts, mesh: Mesh):
        self.config, self.parts, self.mesh = config, parts, mesh
        self.program = jax.jit(self.paint)

    def __call__(
        self, params: dict, captions: Sequence[str], numbers: Sequence[int]
    ) -> np.ndarray:
        """u8 (n, h, w, 3); picture i is drawn from noise `numbers[i]` of the seed.

        The same caption and number give the same picture in whatever company.
        """
        size = batch_size(len(captions), self.config.sample.batch_size, self.mesh)
        done = []
        for start in range(0, len(captions), size):
            watch.expect("a batch of pictures", watch.LONG)
            rows = np.arange(start, start + size) % len(captions)  # the last is filled
            batch = assemble.token_ids(self.config, [captions[i] for i in rows])
            batch["number"] = np.array([numbers[i] for i in rows], np.uint32)
            mine = sharding.local_rows(self.mesh, size)
            batch = {name: value[mine] for name, value in batch.items()}
            image = self.program(params, sharding.put(batch, self.mesh, size))
            done.append(multihost_utils.process_allgather(image, tiled=True))
        return pictures.to_uint8(np.concatenate(done)[: len(captions)])

    def paint(self, params: dict, batch: dict) -> jax.Array:
        """A batch's ids and numbers to images in [-1, 1]."""
        solver = SOLVERS[self.config.sample.solver]
        return self.parts.autoencoder.decode(self.latents(params, batch, solver))

    def latents(self, params: dict, batch: dict, solver: Callable) -> jax.Array:
        config, objective = self.config.sample, self.parts.objective
        formulation = self.parts.formulation
        seed = jax.random.key(config.seed)
        keys = jax.vmap(lambda n: jax.random.fold_in(seed, n))(batch["number"])
        cond = objective.encode(params, batch)
        uncond = prompts.null(cond)
        if config.negative:
            ids = assemble.token_ids(self.config, [config.negative])
            uncond = jax.tree.map(
                lambda u, c: jax.numpy.broadcast_to(u, c.shape),
                objective.encode(params, ids),
                cond,
            )
        return generate(
            objective.velocity(params),
            keys,
            cond,
            uncond,
            shape=self.parts.shape,
            grid=formulation.grid(grids.make(config.grid, config.steps, config.shift)),
            spread=formulation.spread,
            solver=solver,
            scale=config.cfg,
            interval=(config.cfg_start, config.cfg_stop),
            rescale=config.rescale,
        )
