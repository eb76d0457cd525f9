"""Sets of records mixed by weight: whose records a bucket's examples are, in order."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import grain
import numpy as np

from sd3_jax.errors import UserError

SPREAD = 1e6  # the greatest weight over the least, at most


class Set(NamedTuple):
    """Records with epochs of their own, and how often they are drawn."""

    name: str
    numbers: range  # of its records
    weight: float  # relative to the other sets


class Bucket(NamedTuple):
    """Records of one shape. All examples of a batch are of one bucket."""

    name: str
    shapes: dict[str, tuple[int, ...]]  # of the tensors, by name
    sets: list[Set]
    order: grain.MapDataset  # example of the bucket → number of its record


def order(sets: Sequence[Set], seed: int) -> grain.MapDataset:
    """Map example i to the number of its record, by random access for any i.

    Each epoch of a set is a permutation of it.
    """
    epochs = []
    for set_number, mixed_set in enumerate(sets):
        span = mixed_set.numbers
        numbers = grain.MapDataset.range(span.start, span.stop)
        # grain shuffles by a function of (index, seed, epoch) and keeps no table, so
        # memory does not grow with the records. Its seeds are 32 bits.
        epochs.append(numbers.seed((seed + set_number) % 2**32).shuffle().repeat())
    if len(epochs) == 1:
        return epochs[0]
    return grain.MapDataset.mix(epochs, [mixed_set.weight for mixed_set in sets])


def matching_bucket(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
    where: str,
) -> int:
    """The number of the bucket whose shapes these tensors have; or a UserError."""
    for number, expected in enumerate(shapes.values()):
        if all(x.shape == expected.get(name) for name, x in tensors.items()):
            return number
    listed = ", ".join(f"{name} {x.shape}" for name, x in tensors.items())
    raise UserError(f"{where}: {listed} fits no bucket; expected {', '.join(shapes)}")


def check_weights(weights: Sequence[float | int], paths: Sequence[str]) -> None:
    """UserError unless there are no weights, or one positive number for each path."""
    setting = f"weights = {tuple(weights)}"
    if weights and len(weights) != len(paths):
        raise UserError(
            f"{setting}: expected none, or one for each of {len(paths)} paths"
        )
    # NaN fails every comparison, so it is refused as well.
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f"{setting}: expected finite numbers > 0; to use 0, remove the path"
        )
    if weights and max(weights) > SPREAD * min(weights):
        raise UserError(f"{setting}: no weight may be over {SPREAD:g} times another")
