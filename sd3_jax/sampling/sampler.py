"""Prompts to pictures by one compiled program, for sample, train and evaluate."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures
from sd3_jax.assembly import encoder_identity, examples, model_parts
from sd3_jax.data import tokenizers
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.sampling import arguments, prompts
from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling.encoder import Encoder
from sd3_jax.sampling.generate import generate
from sd3_jax.sampling.scheduler_config import PUBLISHED


def batch_size(n: int, most: int, mesh: Mesh) -> int:
    """For n pictures: at most `most`, and enough to give every shard a row."""
    shards = sharding.batch_shards(mesh)
    return min(max(shards, most // shards * shards), -(-n // shards) * shards)


class Painter:
    """Pictures of prompts as config.sample says; compiled once for a batch size.

    A recipe that reads encoded text and latents paints by config.encode.weights.
    """

    def __init__(
        self,
        config: ConfigDict,
        parts: model_parts.Parts,
        mesh: Mesh,
        encoder: Encoder | None = None,
    ):
        self.config, self.parts, self.mesh = config, parts, mesh
        if encoder is not None:
            self.encoder = encoder
        s = config.sample
        interval = s.cfg_start, s.cfg_stop
        self.guided = arguments.guided(
            s.cfg, interval, s.rescale, negative=bool(s.negative)
        )
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
            watchdog.expect("a batch of pictures", watchdog.LONG)
            rows = np.arange(start, start + size) % len(captions)  # the last is filled
            batch = self.tokens([captions[i] for i in rows])
            batch["number"] = np.array([numbers[i] for i in rows], np.uint32)
            images = self.program(params, self.put(batch, size), self.negative)
            image = images if self.encoder is None else self.decoded(images)
            done.append(multihost_utils.process_allgather(image, tiled=True))
        return pictures.to_uint8(np.concatenate(done)[: len(captions)])

    @functools.cached_property
    def encoder(self) -> Encoder | None:
        """Makes text of captions and pictures of latents, where the recipe does not."""
        check(self.config)
        if self.config.text.name == "bytes":
            return None
        parts = ["vae", *bundles.TEXT]
        encoder = examples.encoder(self.config, self.mesh, parts)
        encoder_identity.warn(self.config, self.parts.encoders, encoder)
        return encoder

    @functools.cached_property
    def negative(self) -> dict[str, jax.Array]:
        """The negative prompt, a row for every shard; {} if there is none to use."""
        if not self.config.sample.negative or not self.guided:
            return {}
        shards = sharding.batch_shards(self.mesh)
        return self.put(self.tokens([self.config.sample.negative] * shards), shards)

    @property
    def sampler(self) -> tuple[str, np.ndarray]:
        """The solver and its t's, the released models' where the recipe is silent."""
        s, tokens = self.config.sample, 0  # which no shift here depends on
        options = {name: s[name] or None for name in ("solver", "grid", "shift")}
        return PUBLISHED.sampler(s.steps, tokens, **options)

    def tokens(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        if self.encoder is not None:
            return self.encoder.tokenize(captions)
        return tokenizers.bytes_of(captions, self.config.text.length)

    def put(self, batch: dict[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        rows = sharding.local_rows(self.mesh, size)
        batch = {name: value[rows] for name, value in batch.items()}
        put = self.encoder or functools.partial(sharding.put, mesh=self.mesh)
        return put(batch, batch_size=size)

    def decoded(self, x0: jax.Array) -> jax.Array:
        return 2 * self.encoder.bundle.decode(x0) - 1

    def paint(self, params: dict, batch: dict, negative: dict) -> jax.Array:
        """A batch's text and numbers to images in [-1, 1], or latents to decode."""
        x0 = self.latents(params, batch, negative, SOLVERS[self.sampler[0]])
        return x0 if self.encoder is not None else self.parts.autoencoder.decode(x0)

    def latents(
        self, params: dict, batch: dict, negative: dict, solver: Callable
    ) -> jax.Array:
        config, objective = self.config.sample, self.parts.objective
        formulation = self.parts.formulation
        seed = jax.random.key(config.seed)
        keys = jax.vmap(lambda n: jax.random.fold_in(seed, n))(batch["number"])
        cond = objective.encode(params, batch)
        uncond = prompts.null(cond)
        if negative:
            uncond = jax.tree.map(
                lambda u, c: jnp.broadcast_to(u[:1], c.shape),
                objective.encode(params, negative),
                cond,
            )
        return generate(
            objective.velocity(params),
            keys,
            cond,
            uncond,
            shape=self.parts.shape,
            grid=formulation.grid(self.sampler[1]),
            spread=formulation.spread,
            solver=solver,
            scale=config.cfg,
            interval=(config.cfg_start, config.cfg_stop),
            rescale=config.rescale,
        )


def check(config: ConfigDict) -> None:
    """UserError if the recipe has not what makes text of captions."""
    if config.text.name != "bytes" and not config.encode.weights:
        raise UserError(
            f'config.text.name = "{config.text.name}": this recipe reads text that was'
            " encoded before, and prompts need encoders: wanted config.encode.weights,"
            ' a released model that has them, or "bytes"'
        )
