"""Validation loss at equally spaced times on held-out data (paper, appendix B.3)."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

AHEAD = 2  # batches that the host is ahead of the devices
TIMES = (np.arange(8) + 0.5) / 8


def val_loss(
    loss_at: Callable, params: dict, key: jax.Array, batches: Iterable[dict]
) -> Iterator[tuple[str, float]]:
    """Yields ("loss_t0.0625", ...) for each time, then their mean as "loss".

    `loss_at(params, key, batch, t)` takes a scalar t. Noise depends on the batch and
    not on the time, so that the curve over t is smooth. The losses come to the host
    together, at the end.
    """
    losses: list[list[jax.Array]] = []
    for i, batch in enumerate(batches):
        if i >= AHEAD:  # or batches that are still to be worked on fill the memory
            jax.block_until_ready(losses[i - AHEAD])
        # One key for all times of a batch: equal noise, so that the curve over t is
        # smooth.
        batch_key = jax.random.fold_in(key, i)
        losses.append([loss_at(params, batch_key, batch, np.float32(t)) for t in TIMES])
    mean = np.mean(jax.device_get(losses), axis=0, dtype=np.float64)
    for t, value in zip(TIMES, mean):
        yield f"loss_t{t:g}", float(value)
    yield "loss", float(mean.mean())
