"""Batches of a sampling job: which pictures are painted together, in what order."""

import logging
from collections.abc import Callable, Iterator, Sequence

from jax.sharding import Mesh

from sd3_jax.distributed import sharding
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.job.row_batches import batch_size

log = logging.getLogger(__name__)
LISTED = 20  # programs, and groups of one, that the log lists


def batches(
    tasks: list[Task],
    most: int,
    mesh: Mesh,
    program: Callable[[Task], tuple],
    *,
    spread: bool = False,
) -> Iterator[tuple[list[Task], int]]:
    """Tasks of one shape and one set of settings together, and the program's size.

    Those of one program follow each other. A resumed job has the batches of an
    uninterrupted one, so its pictures are equal. `spread` is that of batch_size.
    """
    # Grouped over all tasks, those that are done included, so that a resumed job has
    # the batches of the first one.
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    programs: dict[tuple, list[list[Task]]] = {}
    for group in groups.values():
        size = size_of(group, most, mesh, spread)
        programs.setdefault((program(group[0]), size), []).append(group)
    log_programs(programs, len(tasks))
    for (_, size), together in programs.items():
        for group in together:
            for start in range(0, len(group), size):
                yield group[start : start + size], size


def size_of(group: list[Task], most: int, mesh: Mesh, spread: bool) -> int:
    """Rows of the group's batches; a picture to repeat has its own."""
    size = batch_size(len(group), most, mesh, spread=spread)
    if group[0].slot is None or group[0].slot[1] == size:
        return size
    if spread or group[0].slot[1] % sharding.batch_shards(mesh) == 0:
        return group[0].slot[1]
    message = "%s: painted in a batch of %d, which this mesh does not divide"
    log.warning(
        f"{message}: the last bits may differ", group[0].where, group[0].slot[1]
    )
    # Large enough for its row, in a size that the mesh divides.
    return max(size, -(-group[0].slot[1] // size) * size)


def log_programs(programs: dict[tuple, list[list[Task]]], total: int) -> None:
    count = sum(map(len, programs.values()))
    if count == 1:
        return
    message = "%d pictures in %d groups of equal settings, by %d programs"
    log.info(message, total, count, len(programs))
    for (words, size), groups in list(programs.items())[:LISTED]:
        numbers = [len(group) for group in groups]
        listed = ", ".join(map(str, numbers[:LISTED])) + ", …" * (len(numbers) > LISTED)
        text = ", ".join(map(str, words))
        message = "program of %s, batches of %d: %d pictures, in groups of %s"
        log.info(message, text, size, sum(numbers), listed)


def filled(batch: Sequence, size: int) -> list:
    """The batch, repeated from its start up to the size of the program."""
    return [batch[i % len(batch)] for i in range(size)]
