"""Validation loss at equally spaced times on held-out data (paper, appendix B.3)."""

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

TIMES = (np.arange(8) + 0.5) / 8


def val_loss(
    loss_at: Callable, params: dict, key: jax.Array, batches: Iterable[dict]
) -> Iterator[tuple[str, float]]:
    """Yields ("loss_t0.0625", ...) for each time, then their mean as "loss".

    `loss_at(params, key, batch, t)` takes a scalar t. Noise depends on the batch and
    not on the time, so that the curve over t is smooth.
    """
    total, count = np.zeros(len(TIMES)), 0
    for i, batch in enumerate(batches):
        own = jax.random.fold_in(key, i)
        total += [float(loss_at(params, own, batch, np.float32(t))) for t in TIMES]
        count += 1
    for t, value in zip(TIMES, total / count):
        yield f"loss_t{t:g}", value
    yield "loss", float(total.mean() / count)
