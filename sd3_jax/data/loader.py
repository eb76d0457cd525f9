"""Batches of a run: a pure function from step to rows, read ahead by grain."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from sd3_jax.data import malloc
from sd3_jax.errors import RetryableError, UserError

STEPS = 2**31 - 1  # a bound that no run reaches


class Loader:
    """An iterator over this process's rows of each global batch, from step `start` on.

    `rows` are their indices in the batch (sharding.local_rows), in increasing order.

    `source.batch(indices)` returns the examples with these indices, and their captions
    if there are any, which `tokenize` turns into arrays. Row `row` of step `step` is
    example step * batch_size + row, whatever the number of processes and threads. A run
    is therefore resumed by its step alone, on any hosts. After a change of batch size,
    step n has batch n + `ahead`.
    """

    def __init__(
        self,
        source,
        *,
        batch_size: int,
        rows: np.ndarray,
        tokenize: Callable[[Sequence[str]], dict[str, np.ndarray]] | None = None,
        start: int = 0,
        ahead: int = 0,
        threads: int = 2,
        prefetch: int = 8,
    ):
        malloc.keep_freed()
        self._source, self._batch_size, self._ahead = source, batch_size, ahead

        def load(step: int) -> dict[str, np.ndarray]:
            # Only this process's rows are read: no host reads another's examples.
            batch = source.batch((step + ahead) * batch_size + rows)
            captions = batch.pop("caption", None)
            return batch if captions is None else batch | tokenize(captions)

        steps = grain.MapDataset.range(STEPS).map(load)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._batches = iter(steps.to_iter_dataset(options))
        # grain's state for a dataset without shuffling or filters is its next index:
        # setting it skips to a step in no time, and nothing of grain is checkpointed.
        self._batches.set_state({"next_index": start})

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except (UserError, RetryableError) as error:
            error.__notes__ = []  # grain adds lines to what is a one-line message
            raise

    def names(self, step: int) -> list[str]:
        """Names of all examples of a global batch, in the order of its rows.

        Step 0 has the first batch, whatever step this loader started at.
        """
        first = (step + self._ahead) * self._batch_size
        return self._source.names(np.arange(first, first + self._batch_size))
