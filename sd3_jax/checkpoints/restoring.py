"""Restore from a step: its state or a part of it, its data position, its config.

Checked in this order: the checksums of the files; the names, dtypes and shapes of the
leaves; the digest of the JSON; and the fingerprints of the loaded values, taken before
the save. All processes do it together.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from sd3_jax import files, tree
from sd3_jax.checkpoints import integrity, step_folders
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.checkpoints.orbax_io import load, orbax_context, readable
from sd3_jax.checkpoints.step_folders import shared_steps, step_path, wait_or_raise
from sd3_jax.distributed import processes
from sd3_jax.errors import RetryableError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")


def read_newest(
    directory: epath.PathLike, read: Callable[[int], T], step: int | None = None
) -> T:
    """read(step); without `step`, of the newest step that `read` can read.

    Steps where it raises UnreadableCheckpoint are logged and skipped. What must be of
    one step, such as weights and their config, is to be read in one call of `read`.
    """
    directory = epath.Path(files.absolute(directory))
    first = int(step_path(directory, step).name)
    if step is not None:
        return read(first)
    steps = [s for s in shared_steps(directory) if s <= first]
    for number in reversed(steps):
        try:
            return read(number)
        except UnreadableCheckpoint as fault:
            # Only training sets steps aside; who reads weights leaves the folder alone.
            if number == steps[0]:
                raise
            log.warning("%s: using an earlier step", fault)
    raise UserError(
        f"no complete checkpoint in {directory}; train first, check --workdir, or name"
        " released weights in config.weights"
    )


def restore_params(
    directory: epath.PathLike,
    abstract: Any,
    *,
    which: Literal["ema", "params"] = "ema",
    step: int | None = None,
) -> tuple[Any, int]:
    """(weights, step), reading nothing else of the state; values are checked.

    Without `step`, the newest sound one: damaged steps are logged and skipped.
    """
    path = epath.Path(files.absolute(directory))
    read = lambda number: (restore_part(path / str(number), abstract, which), number)
    return read_newest(directory, read, step)


def saved_config(directory: epath.PathLike, step: int | None = None) -> dict:
    """The config a step was trained with; tuples have become lists."""
    return _saved_json(directory, step, "config")


def saved_data(directory: epath.PathLike, step: int | None = None) -> dict:
    """The data record of a step: its position, its source's identity and so on."""
    return _saved_json(directory, step, "data")


def _saved_json(directory: epath.PathLike, step: int | None, item: str) -> dict:
    path = step_path(epath.Path(files.absolute(directory)), step)
    # `about` first: it refuses a step of a newer format before its JSON is believed.
    about = read_together(path, lambda: read_about(path))

    def read():
        items = load(path, {"data": None, "config": None})
        if about:
            integrity.check_about(path, about, items["data"], items["config"])
        return items[item]

    return read_together(path, read)


def restore_step(path: epath.Path, abstract: Any) -> tuple[Any, dict, dict]:
    """(state, data, config) of one step, laid out as `abstract`."""
    # Every byte of the state is to be read anyway, so every file is summed first, each
    # process a share of them.
    read_together(path, lambda: integrity.check_files(path))
    about = read_together(path, lambda: read_about(path))
    read_together(path, lambda: compare_leaves(path, abstract))

    def read():
        items = load(path, {"state": abstract, "data": None, "config": None})
        if about:
            integrity.check_about(path, about, items["data"], items["config"])
            # Once more, after the checksums: these are of the values on the devices,
            # and cover what lies between a sound file and them.
            integrity.check_leaves(path, about, items["state"])
        return items

    items = read_together(path, read)
    if about:
        _log_differences(path, about)
    return items["state"], items["data"], items["config"]


def restore_part(path: epath.Path, abstract: Any, which: str) -> Any:
    """The tree `which` of a step's state; the other leaves are not read."""
    # Small files only: to sum all would read the whole state for a fourth of it. The
    # fingerprints of the leaves cover those that are read.
    read_together(path, lambda: integrity.check_files(path, largest=integrity.SMALL))
    about = read_together(path, lambda: read_about(path))
    read_together(path, lambda: compare_leaves(path, {which: abstract}, only=which))

    def read():
        part = load(path, {"state": {which: abstract}}, partial=True)["state"]
        if about:
            integrity.check_leaves(path, about, part)
        return part[which]

    return read_together(path, read)


def read_together(path: epath.Path, read: Callable[[], Any]) -> Any:
    """read(), once every process has; what fails in one fails in all.

    A process that met a fault alone would be missed in the next collective. Storage
    that does not answer is asked again, and damage is believed when it is seen twice:
    a read that failed once looks like a file that is cut.
    """
    doubted = False
    for pause in (*step_folders.PAUSES, None):
        content = fault = None
        try:
            content = read()
        except (UnreadableCheckpoint, RetryableError) as error:
            fault = error
        # Two questions, each asked by all: did all read it, and did any see damage.
        # Another UserError ends this process, and the watchdogs end its peers.
        if processes.all_well(fault is None):
            return content
        damaged = isinstance(fault, UnreadableCheckpoint)
        if not processes.all_well(not damaged):
            if doubted:
                peers = UnreadableCheckpoint(
                    f"{path} is damaged: another process reports it"
                )
                raise fault if damaged else peers
            doubted = True
        wait_or_raise(
            fault or RetryableError(f"another process cannot read {path}"), pause
        )


def read_about(path: epath.Path) -> dict:
    """The step's format, circumstances and fingerprints; {} of an older version's."""
    if not integrity.is_there(path / "about"):
        return {}
    about = load(path, {"about": None})["about"]
    if not isinstance(about, dict) or not isinstance(about.get("fingerprints"), dict):
        raise UnreadableCheckpoint(f"{path} is damaged: about")
    integrity.refuse_newer(path, about)
    integrity.refuse_renamed(path, about)
    return about


def compare_leaves(path: epath.Path, abstract: Any, *, only: str | None = None) -> None:
    """UserError unless the stored leaves are those expected; reads metadata alone.

    Orbax would cast another dtype silently.
    """
    with readable(path):
        with orbax_context():
            stored = ocp.metadata(path, "state").metadata
        if not jax.tree.leaves(stored):  # what orbax makes of damaged metadata
            raise ValueError("it holds no arrays")
    present = describe_leaves(stored if only is None else {only: stored.get(only, {})})
    wanted = describe_leaves(abstract)
    if faults := tree.mismatch(wanted, present, "dtype or shape"):
        raise UserError(f"{path} does not fit: {faults}")


def describe_leaves(state: Any) -> dict[str, str]:
    """Path to "float32[2, 3]" of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {tree.path_name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _log_differences(path: epath.Path, about: dict) -> None:
    if lines := list(processes.differing(about["made"], integrity.circumstances())):
        log.info(
            "%s was saved in another environment (%s): the resumed run agrees with the"
            " unbroken one up to rounding, not bit for bit",
            path,
            "; ".join(lines),
        )
