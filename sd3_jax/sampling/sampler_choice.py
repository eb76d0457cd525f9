"""One function that paints captions, by a trained run or by released weights."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import model_parts
from sd3_jax.distributed import watchdog
from sd3_jax.sampling import prompt_file
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.released_sampler import ReleasedPainter
from sd3_jax.sampling.sampler import Painter, batch_size

Paint = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def painter(
    config: ConfigDict, parts: model_parts.Parts | None, mesh: Mesh, params: Any
) -> Paint:
    """paint(captions, numbers) -> u8 (n, h, w, 3), as config.sample and image say.

    `params` are a run's, of these `parts`, or the Bundle that config.weights names
    (released.load); then `parts` may be None. Picture i is drawn from noise
    `numbers[i]` of config.sample.seed, in whatever company. Every process makes the
    same calls and gets all pictures.
    """
    if isinstance(params, Bundle):
        return _released(config, mesh, params)
    trained = Painter(config, parts, mesh)
    return lambda captions, numbers: trained(params, captions, numbers)


def batches(
    paint: Paint, captions: Sequence[str], numbers: Sequence[int], size: int
) -> Iterator[np.ndarray]:
    """The pictures of all captions, at most `size` at a time and in order.

    The last call is filled with captions again, so that all are of one program.
    """
    size = min(size, len(captions))
    for start in range(0, len(captions), size):
        rows = np.arange(start, start + size) % len(captions)
        images = paint([captions[i] for i in rows], [numbers[i] for i in rows])
        yield images[: len(captions) - start]


def _released(config: ConfigDict, mesh: Mesh, bundle: Bundle) -> Paint:
    released = ReleasedPainter(bundle)

    def paint(captions, numbers):
        tasks = [
            prompt_file.task(config, caption, number)
            for caption, number in zip(captions, numbers)
        ]
        size = batch_size(len(tasks), config.sample.batch_size, mesh)
        done = []
        for start in range(0, len(tasks), size):
            watchdog.expect("a batch of pictures", watchdog.LONG)
            rows = np.arange(start, start + size) % len(tasks)
            done.append(released([tasks[i] for i in rows]))
        return np.concatenate(done)[: len(tasks)]

    return paint
