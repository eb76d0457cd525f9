"""Batches on many hosts: process 0 hands each to all, and all paint it."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sd3_jax.distributed import processes, watchdog
from sd3_jax.errors import UserError
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.serving.request_tasks import Row
from sd3_jax.serving.uploads import Spool

log = logging.getLogger(__name__)
LOOK = 2.0  # seconds between two looks for a SIGTERM while no batch comes
UNIT = 2**12  # bytes; messages are padded to powers of two of it, one program each
FILES = ("image", "mask")


def handed_to_all(paint: Callable[[Sequence[Row]], Any]) -> Callable:
    """paint for process 0, which tells the others of every batch."""
    if jax.process_count() == 1:
        return paint
    # Announcements are keys of the coordination service, which are set only once.
    turns = iter(range(2**62))

    def paint_everywhere(rows: Sequence[Row]) -> Any:
        # Before process 0 starts: programs have collectives, which wait for every host.
        _send(next(turns), _packed(rows))
        return paint(rows)

    # The empty message ends `follow`.
    paint_everywhere.stop = lambda: _send(next(turns), b"")
    return paint_everywhere


def follow(
    config: ConfigDict,
    paint: Callable[[Sequence[Row]], Any],
    stop: Callable[[], bool],
    spool: Spool,
) -> None:
    """Paint what process 0 hands out, until it stops; for the other processes."""
    turn = 0
    while True:
        watchdog.expect("requests", None)
        # Waiting for a collective would block in XLA, deaf to signals and with a
        # timeout: the announcement goes by the coordination service instead, and has
        # the size that the broadcast's shape needs.
        size = processes.announced(turn, LOOK)
        stop()  # passes a SIGTERM of this process on to process 0
        if size is None:
            continue
        watchdog.expect("a batch of pictures", watchdog.LONG)
        message, turn = _broadcast(size, None), turn + 1
        if not message:
            return
        rows, paths = _unpacked(message, config, spool)
        try:
            paint(rows)
        except UserError as error:  # process 0 has the same, and answers it
            log.info("a batch failed: %s", error)
        finally:
            spool.remove(paths)


def _send(turn: int, message: bytes) -> None:
    processes.announce(turn, len(message))
    _broadcast(len(message), message)


def _broadcast(size: int, message: bytes | None) -> bytes:
    # broadcast_one_to_all compiles a program for each shape.
    padded = UNIT
    while padded < size:
        padded *= 2
    data = np.zeros(padded, np.uint8)
    if message:
        # The others pass zeros of the same shape, which the broadcast replaces.
        data[:size] = np.frombuffer(message, np.uint8)
    data = np.asarray(multihost_utils.broadcast_one_to_all(data), np.uint8)
    return data[:size].tobytes()


def _packed(rows: Sequence[Row]) -> bytes:
    """A head of JSON, and the files of the rows, each once."""
    files: dict[str, bytes] = {}
    heads = []
    for row in rows:
        task = row.task
        for name in FILES:
            if path := task.settings.get(name):
                files.setdefault(path, Path(path).read_bytes())
        heads.append(
            {
                "prompt": task.prompt,
                "number": task.number,
                "index": task.index,
                "settings": task.settings,
                "size": task.size,
                "adapters": row.adapters,
            }
        )
    sizes = {path: len(data) for path, data in files.items()}
    head = json.dumps({"rows": heads, "files": sizes}).encode()
    # Hosts share no disk in general, so that the uploads travel with the batch.
    return len(head).to_bytes(8, "big") + head + b"".join(files.values())


def _unpacked(
    message: bytes, config: ConfigDict, spool: Spool
) -> tuple[list[Row], list[str]]:
    """The rows, and the paths of their files in this process's spool."""
    start = 8 + int.from_bytes(message[:8], "big")
    head = json.loads(message[8:start])
    paths = {}
    for path, size in head["files"].items():
        paths[path] = spool.write(Path(path).name, message[start : start + size])
        start += size
    return [_row(x, config, paths) for x in head["rows"]], list(paths.values())


def _row(fields: dict, config: ConfigDict, paths: dict[str, str]) -> Row:
    settings = fields["settings"]
    for name in FILES:
        # Paths on process 0's disk become those of this host's copies.
        if name in settings:
            settings[name] = paths[settings[name]]
    prompt = fields["prompt"]
    # A list, since JSON has no tuples.
    prompt = prompt if isinstance(prompt, str) else tuple(prompt)
    # Samplers of a checkpoint read the size from the task's config.
    config = config.copy_and_resolve_references()
    config.image.update(height=settings["height"], width=settings["width"])
    if "solver" in settings:
        config.sample.update(solver=settings["solver"], cfg=settings["cfg"])
    size = tuple(fields["size"])
    head = fields["index"], prompt, fields["number"], config, settings
    return Row(Task(*head, size=size), fields["adapters"])
