"""The loss on held-out examples: the same examples and noise at each validation."""

import logging
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import encoder_identity, examples, model_parts
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.evaluation.val_loss import val_loss
from sd3_jax.sampling.text.encoder import Encoder

log = logging.getLogger(__name__)


class Validation:
    """The mean loss at each of eight times; call it with the model's parameters.

    The same held-out examples and the same noise each time, so that two values differ
    by the weights alone.
    """

    def __init__(
        self,
        config: ConfigDict,
        parts: model_parts.Parts,
        mesh: Mesh,
        encoder: Encoder | None = None,
    ):
        self.config, self.mesh, self.encoder = config, mesh, encoder
        self.trained_with = parts.encoders
        self.size = examples.batch_size(config, held_out=True)
        self.source = None  # opened by the first validation, for those to come
        self.key = jax.random.key(config.seed + 1)  # not the noise of training
        # t is an argument, not a constant: one program serves all eight times.
        self.program = jax.jit(
            lambda params, key, batch, t: parts.objective.loss_at(
                params, key, batch, jnp.broadcast_to(t, self.size)
            )
        )

    def __call__(self, params: dict) -> dict[str, float]:
        return dict(val_loss(self.program, params, self.key, self.batches()))

    def batches(self) -> Iterator[dict]:
        """The held-out examples on the mesh, each batch read when it is asked for."""
        size = self.size
        key = f"{'eval' if self.config.eval.batch_size else 'data'}.batch_size"
        rows = sharding.local_rows(self.mesh, size, key=key)
        if self.source is None:
            self.source = examples.source(self.config, held_out=True)
        if self.encoder is None:
            self.encoder = examples.encoder_of(self.config, self.source, self.mesh)
        encoder = self.encoder
        held_out_encoders = encoder_identity.of_run(self.source, encoder)
        if differences := encoder_identity.differing(
            self.trained_with, held_out_encoders
        ):
            words = "config.data.held_out: encoded by others than the run's records: %s"
            log.warning(words, differences)
        loader = examples.loader(
            self.config, rows, examples=self.source, encoder=encoder, held_out=True
        )
        count = max(1, self.config.eval.examples // size)
        place_batch = encoder or partial(sharding.put, mesh=self.mesh)

        def next_batch(_):
            watchdog.expect("a batch of validation", watchdog.LONG)
            return place_batch(next(loader), batch_size=size)

        return map(next_batch, range(count))
