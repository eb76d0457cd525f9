"""Batches for a run's steps: step -> rows, a pure function, read ahead by grain."""

from collections.abc import Callable, Sequence

import grain
import numpy as np

from sd3_jax.data import malloc
from sd3_jax.errors import RetryableError, UserError

STEPS = 2**31 - 1  # more than any run has


class Loader:
    """This process's rows of each global batch, from step `start` on.

    `rows` are their indices in the batch (sharding.local_rows), in increasing order.

    `source.batch(indices)` gives the examples with these indices, and their captions
    if there are any, of which `tokenize` makes arrays. Example step *
    batch_size + row is row `row` of step `step`, whatever the number of processes and
    threads, so a run is resumed, on any hosts, by its step alone. Step n of a run that
    went on with another batch size has batch n + `ahead`.
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
            batch = source.batch((step + ahead) * batch_size + rows)
            captions = batch.pop("caption", None)
            return batch if captions is None else batch | tokenize(captions)

        steps = grain.MapDataset.range(STEPS).map(load)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
        self._batches = iter(steps.to_iter_dataset(options))
        self._batches.set_state({"next_index": start})

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except (UserError, RetryableError) as error:
            error.__notes__ = []  # grain's, on the frames of the traceback
            raise

    def names(self, step: int) -> list[str]:
        """Every example of a global batch, by name, in the order of its rows.

        Step 0 has the first batch, so step n's is the one that a run's n + 1st update
        is made from, whatever step this loader started at.
        """
        first = (step + self._ahead) * self._batch_size
        return self._source.names(np.arange(first, first + self._batch_size))
