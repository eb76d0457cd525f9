"""Rows of pictures in batches of one size, which one program paints."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from sd3_jax.distributed import sharding, watchdog


def sample_in_batches(
    sample: Callable[[Sequence[str], Sequence[int]], np.ndarray],
    captions: Sequence[str],
    numbers: Sequence[int],
    size: int,
) -> Iterator[np.ndarray]:
    """Yields the pictures of all captions in order, at most `size` at a time."""
    # A set smaller than a batch is not padded to it.
    size = min(size, len(captions))
    for rows in padded_batches(len(captions), size):
        images = sample([captions[i] for i in rows], [numbers[i] for i in rows])
        yield images[: len(captions) - rows[0]]


def batch_size(n: int, most: int, mesh: Mesh, *, spread: bool = False) -> int:
    """A multiple of the batch's shards: as many as n pictures need, at most `most`, but
    never less than a row for each shard.

    With `spread` fewer pictures than shards are a batch: sd3_jax.generate gives the
    devices without a row to the tokens (sharding.spread).
    """
    shards = sharding.batch_shards(mesh)
    if spread and min(n, most) < shards:
        return min(n, most)
    # Rounded down to whole shards from `most`, and up from n.
    return min(max(shards, most // shards * shards), -(-n // shards) * shards)


def padded_batches(n: int, size: int) -> Iterator[np.ndarray]:
    """Indices of n rows, `size` at a time; the last batch wraps around to row 0.

    A shorter last batch would be another shape, and so another compiled program.
    """
    for start in range(0, n, size):
        # Repeated rows and not zeros: their values are normal, and none of them is NaN.
        yield np.arange(start, start + size) % n


def in_programs(
    sample_rows: Callable[[np.ndarray], np.ndarray], n: int, size: int
) -> np.ndarray:
    """Pictures of n rows, by a program of `size` rows that is called in turn."""
    done = []
    for rows in padded_batches(n, size):
        watchdog.expect("a batch of pictures", watchdog.LONG)
        done.append(sample_rows(rows))
    return np.concatenate(done)[:n]  # without the rows that wrapped around
