"""A run's checkpoint folder: which steps are complete, which stay, which are set aside.

A step is a folder named by its number that holds commit_success.txt. Orbax takes any
folder with such a name for a step, even an empty one or one that was half copied.
"""

import logging
import os
import re
import shutil
import time
from typing import Any

from etils import epath

from sd3_jax import files
from sd3_jax.checkpoints import integrity
from sd3_jax.distributed import processes
from sd3_jax.errors import RetryableError, UserError, explained
from sd3_jax.foreign_text import LISTED

COMMIT = "commit_success.txt"  # orbax writes it last
TMP = ".orbax-checkpoint-tmp"  # suffix of the folder that a killed save leaves behind
DAMAGED = "damaged-"  # prefix of a step's folder once it is set aside
PAUSES = (0.5, 2.0, 8.0)  # seconds before a read is tried again
log = logging.getLogger(__name__)


def prepare(directory: epath.Path) -> None:
    """Make the folder, remove what killed saves left, and see that it takes files."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in files.children(directory):
        # Orbax removes them only on request and in the background: perhaps never, and
        # each has the size of a checkpoint.
        if path.name.endswith(TMP):
            path.rmtree()
    probe = directory / "write_probe"  # now, rather than a thousand steps later
    probe.write_text("")
    probe.unlink()


def folder_identity(directory: epath.Path) -> Any:
    """A value that stays equal as long as it is the same folder; None without one."""
    if files.remote(directory):
        return "bucket"  # its folders come and go with the files in them
    try:
        status = os.stat(directory)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def require_space(directory: epath.Path, size: int) -> None:
    """UserError if the disk has less than `size` bytes free; a bucket has no end."""
    if files.remote(directory):
        return
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(
            f"{directory} has {free / 1e9:.3g} GB free but two checkpoints need"
            f" {size / 1e9:.3g} GB; free some space or use another workdir"
        )


def numbered_steps(directory: epath.Path) -> list[int]:
    """Numbers of all step folders, complete or not, in increasing order."""
    if not integrity.is_there(directory):
        return []
    names = (path.name for path in files.children(directory))
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))


def complete_steps(directory: epath.Path) -> list[int]:
    """Complete steps, oldest first."""
    committed = lambda step: integrity.is_there(directory / str(step) / COMMIT)
    return [step for step in numbered_steps(directory) if committed(step)]


def shared_steps(directory: epath.Path) -> list[int]:
    """Complete steps as process 0 sees them: the same answer in every process.

    Network file systems show a new file to some hosts before others. Processes that
    each listed for themselves could restore different steps.
    """

    def list_steps() -> list[int]:
        for pause in (*PAUSES, None):  # None: the last try
            try:
                with explained(f"cannot read checkpoints in {directory}"):
                    return complete_steps(directory)
            except RetryableError as fault:
                wait_or_raise(fault, pause)

    return processes.first(list_steps)


def step_path(directory: epath.Path, step: int | None) -> epath.Path:
    """The folder of a step, the newest by default; UserError if it is not complete."""
    steps = shared_steps(directory)
    if step is None and not steps:
        raise UserError(
            f"no complete checkpoint in {directory}; train first, check --workdir, or"
            " name released weights in config.weights"
        )
    path = directory / str(max(steps) if step is None else step)
    if step is not None and step not in steps:
        newest = ", ".join(map(str, steps[-LISTED:])) or "none"
        raise UserError(
            f"{path} is not a complete checkpoint; complete steps: {newest}"
        )
    return path


def wait_or_raise(fault: RetryableError, seconds: float | None) -> None:
    """Wait before the next try; raise the fault after the last."""
    if seconds is None:
        raise fault
    log.warning("%s; retrying in %g s", fault, seconds)
    time.sleep(seconds)


def set_aside(path: epath.Path, fault: UserError) -> str:
    """Rename a damaged step so that it no longer counts; returns its new name.

    Process 0 renames, for all. The reason goes into damaged.txt.
    """

    def rename() -> str:
        directory = path.parent
        with explained(f"cannot set {path} aside"):
            names = {x.name for x in files.children(directory)}
            name, i = f"{DAMAGED}{path.name}", 1
            while name in names:  # the run came to this step again, and again to damage
                name, i = f"{DAMAGED}{path.name}-{i + 1}", i + 1
            if files.remote(path):
                # An object store copies a folder file by file. Without the commit file
                # first, a kill in between would leave part of a step that counts.
                (path / COMMIT).unlink(missing_ok=True)
            path.rename(directory / name)
            (directory / name / "damaged.txt").write_text(f"{fault}\n")
            return name

    return processes.first(rename)


def prune(directory: epath.Path, *, saved: int, keep: int, keep_every: int | None):
    """Delete steps older than the newest, but the `keep` newest and the keepers.

    A keeper is a step that `keep_every` divides. `saved` is the step just saved.
    """
    steps = complete_steps(directory)
    if saved not in steps:
        # The file system's listing is behind. By such a list the wrong steps would go,
        # so nothing does until the next save.
        return
    lasting = set(steps[-keep:])
    lasting |= {s for s in steps if keep_every and s % keep_every == 0}
    # Incomplete folders of older numbers go too: a deletion that was cut off.
    for step in numbered_steps(directory):
        if step < steps[-1] and step not in lasting:
            path = directory / str(step)
            (path / COMMIT).unlink(missing_ok=True)  # first: half a step is none
            path.rmtree()
