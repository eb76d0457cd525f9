"""One atomic, asynchronous save of {state, data position, config}, and the way back.

Orbax writes and reads a step; which steps exist, which stay and which are sound is
decided here: a step is a folder named by its number which holds commit_success.txt,
nothing else is. One that is damaged is set aside, and the step before it counts.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from sd3_jax import files, tree
from sd3_jax.checkpoints import integrity
from sd3_jax.checkpoints.integrity import LISTED, UnreadableCheckpoint
from sd3_jax.distributed import processes
from sd3_jax.errors import RetryableError, RunFailed, UserError, os_code, passing

COMMIT = "commit_success.txt"  # orbax writes it last
TMP = ".orbax-checkpoint-tmp"  # what a killed save leaves behind
LOOK = 5.0  # seconds between two looks for the folder that is saved to
DAMAGED = "damaged-"  # what a step's folder is called once it is set aside
PAUSES = (0.5, 2.0, 8.0)  # seconds before a read is tried again
JSON = ("data", "config", "about")
log = logging.getLogger(__name__)


# Orbax logs pages of traceback for what it also raises; here that becomes one line.
logging.getLogger("absl").addFilter(
    lambda record: not ("orbax" in record.pathname and record.exc_info)
)


class Checkpoints:
    """The steps of one run: saved when due, pruned by policy, restored with checks.

    Every process makes the same calls with the same steps. Use it as a context
    manager: leaving waits for the save in flight and reports its failure.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        every: int,
        keep: int,
        keep_every: int | None,
        grace: float | None = None,
    ):
        """`grace` is how many seconds follow SIGTERM before SIGKILL, if known."""
        if min(every, keep, keep_every or 1) < 1:
            raise UserError("checkpoint.every, keep and keep_every must be at least 1")
        self.directory = _absolute(directory)
        self._every, self._keep, self._keep_every = every, keep, keep_every
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._asked, self._preempted = -1, False
        self._grace, self._warned = grace, False
        self.save_seconds: float | None = None  # of the last save that is durable
        self.step_seconds = 0.0  # the mean from one save to the next
        self._since: tuple[int, float] | None = None  # a step, and when it ended
        if jax.process_index() == 0:
            with _explained(f"cannot write checkpoints to {self.directory}"):
                _prepare(self.directory)
                self._folder = _identity(self.directory)
        self._last = self.latest() or 0

    def latest(self) -> int | None:
        """The newest complete step; process 0 looks, all processes get its answer."""
        return _latest(self.directory)

    def require_space(self, abstract_state: Any) -> None:
        """Refuse to start where two more saves of such a state have no room."""
        leaves = jax.tree.leaves(abstract_state)
        size = sum(x.size * x.dtype.itemsize for x in leaves)
        processes.first(lambda: _require_space(self.directory, 2 * size))

    def save(
        self,
        step: int,
        state: Any,
        data: dict,
        config: dict,
        *,
        force: bool = False,
        finite: bool = False,
    ) -> bool:
        """Start a save if one is due; call it at every step.

        It returns once the state is on the host, so donating it right after is safe.
        What it started is durable after `wait`. With `finite`, a state that holds a NaN
        or an infinity is refused (RunFailed): nothing good can come after it.
        """
        due = self.due(step, force=force)
        if 0 < step < self._last:
            raise UserError(
                f"{self.directory} holds step {self._last} and this run is at {step}: "
                "continue from the newest step, or write to another directory"
            )
        if self._saving is not None and self._saving.done():
            self.wait()
        first, then = self._since = self._since or (step, time.monotonic())
        if not due:
            return False
        if step > first:
            self.step_seconds = (time.monotonic() - then) / (step - first)
        self.wait()
        began = time.monotonic()
        # A copy now: orbax writes JSON later, when the caller's may have moved on.
        data, config = json.loads(json.dumps([data, config]))
        path = self.directory / str(step)
        prints = tree.fingerprints(state)
        if finite and (names := [k for k, x in prints.items() if x.strange]):
            raise RunFailed(
                f"step {step} is not saved, {len(names)} of its leaves hold NaN or"
                f" infinities: {', '.join(names[:LISTED])}; the newest saved step is"
                f" {self._last}"
            )
        about = integrity.about(step, prints, data, config)
        items = {"state": state, "data": data, "config": config, "about": about}
        with _explained(f"saving {path} failed"), _context():
            self._refuse_vanished()
            response = ocp.save_checkpointables_async(path, items, overwrite=True)
        self._last, self._since = step, (step, time.monotonic())
        self._saving = self._thread.submit(self._finish, path, response, began)
        return True

    def due(self, step: int, *, force: bool = False) -> bool:
        """Whether `save` would save this step; all processes find the same."""
        wanted = self.reached_preemption(step) or force or step % self._every == 0
        return wanted and 0 < step != self._last

    def restore(self, abstract_state: Any, step: int | None = None):
        """(state, data, config) of a step (the newest), laid out as abstract_state.

        Every value is compared with its fingerprint. Without `step`, one that is
        damaged is set aside and the one before is taken, if there is one.
        """
        self.wait()
        while True:
            path = _find(self.directory, step)
            try:
                return _restore(path, abstract_state)
            except UnreadableCheckpoint as fault:
                if step is not None or not self._earlier(path):
                    raise
                self._set_aside(path, fault)

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop here; it stays true once it was."""
        if step != self._asked:  # the answer is true for one step only
            self._asked = step
            self._preempted |= processes.told_to_stop(step)
        return self._preempted

    def wait(self) -> None:
        """Until the save in flight is durable; raises what went wrong with it."""
        saving, self._saving = self._saving, None
        while saving is not None:
            try:
                return saving.result(timeout=LOOK)
            except TimeoutError:  # orbax's processes wait for each other in it
                with _explained("saving failed"):
                    self._refuse_vanished()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=False)  # after wait, idle or without hope

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except (UserError, RunFailed, RetryableError) as e:
            if error is None:
                raise
            error.add_note(str(e))  # what came first is what the user must see

    def _refuse_vanished(self) -> None:
        """The folder must be the one that the run began with: a save in flight makes a
        new one in the place of one that is gone, without the steps that it held."""
        if jax.process_index() == 0 and _identity(self.directory) != self._folder:
            raise FileNotFoundError(f"{self.directory} has vanished")

    def _earlier(self, path: epath.Path) -> bool:
        steps = _known(self.directory)
        return any(step < int(path.name) for step in steps)

    def _set_aside(self, path: epath.Path, fault: UserError) -> None:
        """Under another name, so that it is no step, but lost it is not."""

        def rename() -> str:
            with _explained(f"cannot set {path} aside"):
                names = {x.name for x in files.children(self.directory)}
                name, i = f"{DAMAGED}{path.name}", 1
                while name in names:
                    name, i = f"{DAMAGED}{path.name}-{i + 1}", i + 1
                if files.remote(path):  # there, no folder is renamed at once
                    (path / COMMIT).unlink(missing_ok=True)
                path.rename(self.directory / name)
                (self.directory / name / "damaged.txt").write_text(f"{fault}\n")
                return name

        name = processes.first(rename)
        self._last = self.latest() or 0
        log.warning(
            "%s: it is now %s, and step %d is the newest", fault, name, self._last
        )

    def _finish(self, path: epath.Path, response, began: float) -> None:
        with _explained(f"saving {path} failed"):
            response.result()
            integrity.write_sums(path, jax.process_index(), jax.process_count())
        self._tell_seconds(path, time.monotonic() - began)
        if jax.process_index() == 0:
            try:
                self._prune(int(path.name))
            except (OSError, UserError, RetryableError) as e:  # no reason to stop
                logging.warning("cannot delete old steps in %s: %s", path.parent, e)

    def _tell_seconds(self, path: epath.Path, seconds: float) -> None:
        """Log how long the save took; warn once if the save on SIGTERM may not fit.

        SIGTERM may come just after a save began: that save, the step in progress and
        the last save all come before SIGKILL.
        """
        self.save_seconds = seconds
        if jax.process_index() != 0:
            return
        log.info("step %s is saved: it took %.1f s", path.name, seconds)
        needed = 2 * seconds + self.step_seconds
        if self._grace is not None and needed > self._grace and not self._warned:
            self._warned = True
            log.warning(
                "two saves of %.1f s and a step of %.1f s take %.1f s, but SIGKILL"
                " follows SIGTERM after %g s (SD3_GRACE_S): a preempted run may lose up"
                " to %d steps; lower --config.checkpoint.every to lose less, or raise"
                " GRACE_S if the machine is not Spot",
                seconds,
                self.step_seconds,
                needed,
                self._grace,
                self._every,
            )

    def _prune(self, saved: int) -> None:
        steps = _steps(self.directory)
        if saved not in steps:  # the file system is behind: prune next time
            return
        kept = set(steps[-self._keep :])
        kept |= {s for s in steps if self._keep_every and s % self._keep_every == 0}
        for step in _numbered(self.directory):
            if step < steps[-1] and step not in kept:
                path = self.directory / str(step)
                (path / COMMIT).unlink(missing_ok=True)  # first: half a step is none
                path.rmtree()


def restore_params(
    directory: epath.PathLike,
    abstract: Any,
    *,
    which: Literal["ema", "params"] = "ema",
    step: int | None = None,
) -> tuple[Any, int]:
    """(weights, step), reading nothing else of the state; values are checked.

    Without `step`, the newest that is sound: a damaged one is told of and passed over.
    """
    directory = _absolute(directory)
    first = int(_find(directory, step).name)
    steps = [s for s in _known(directory) if s <= first]
    for number in reversed(steps):
        path = directory / str(number)
        try:
            return _restore_part(path, abstract, which), number
        except UnreadableCheckpoint as fault:
            if step is not None or number == steps[0]:
                raise
            log.warning("%s: an earlier step is taken", fault)
    raise UserError(f"there is no complete checkpoint in {directory}")


def saved_config(directory: epath.PathLike, step: int | None = None) -> dict:
    """The config a step was trained with; tuples have become lists."""
    path = _find(_absolute(directory), step)
    _together(path, lambda: _about(path))
    return _together(path, lambda: _load(path, {"config": None}))["config"]


def saved_data(directory: epath.PathLike, step: int | None = None) -> dict:
    """What a step says of the data that it was trained on."""
    path = _find(_absolute(directory), step)
    _together(path, lambda: _about(path))
    return _together(path, lambda: _load(path, {"data": None}))["data"]


def _absolute(directory: epath.PathLike) -> epath.Path:
    name = os.fspath(directory)
    if "://" not in name:  # gs://, s3://
        name = os.path.abspath(os.path.expanduser(name))
    return epath.Path(name)


def _prepare(directory: epath.Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for path in files.children(directory):
        if path.name.endswith(TMP):
            path.rmtree()
    probe = directory / "write_probe"  # now, rather than a thousand steps later
    probe.write_text("")
    probe.unlink()


def _identity(directory: epath.Path) -> Any:
    """Equal as long as it is the same folder; None if there is none."""
    if files.remote(directory):
        return "bucket"  # its folders come and go with the files in them
    try:
        found = os.stat(directory)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _numbered(directory: epath.Path) -> list[int]:
    if not integrity.is_there(directory):
        return []
    names = (path.name for path in files.children(directory))
    return sorted(int(name) for name in names if re.fullmatch("[1-9][0-9]*", name))


def _steps(directory: epath.Path) -> list[int]:
    """Complete steps, oldest first."""
    return [s for s in _numbered(directory) if _complete(directory / str(s))]


def _complete(path: epath.Path) -> bool:
    return integrity.is_there(path / COMMIT)


def _latest(directory: epath.Path) -> int | None:
    return max(_known(directory), default=None)


def _known(directory: epath.Path) -> list[int]:
    """Complete steps, as process 0 sees them."""

    def look() -> list[int]:
        for pause in (*PAUSES, None):
            try:
                with _explained(f"cannot read checkpoints in {directory}"):
                    return _steps(directory)
            except RetryableError as fault:
                _pause(fault, pause)

    return processes.first(look)


def _pause(fault: RetryableError, seconds: float | None) -> None:
    """Wait before the next try; there is none after the last."""
    if seconds is None:
        raise fault
    log.warning("%s; trying again in %g s", fault, seconds)
    time.sleep(seconds)


def _find(directory: epath.Path, step: int | None) -> epath.Path:
    steps = _known(directory)
    if step is None and not steps:
        raise UserError(f"there is no complete checkpoint in {directory}")
    path = directory / str(max(steps) if step is None else step)
    if step is not None and step not in steps:
        listed = ", ".join(map(str, steps[-LISTED:])) or "none"
        raise UserError(
            f"{path} is not a complete checkpoint; complete steps: {listed}"
        )
    return path


def _together(path: epath.Path, read: Callable[[], Any]) -> Any:
    """What it reads, once every process has; what fails in one fails in all.

    A process that met a fault alone would be missed in the next collective. Storage
    that does not answer is asked again, and damage is believed when it is seen twice.
    """
    doubted = False
    for pause in (*PAUSES, None):
        content = fault = None
        try:
            content = read()
        except (UnreadableCheckpoint, RetryableError) as error:
            fault = error
        if processes.all_well(fault is None):
            return content
        damaged = isinstance(fault, UnreadableCheckpoint)
        if not processes.all_well(not damaged):
            if doubted:
                raise (
                    fault
                    if damaged
                    else UnreadableCheckpoint(f"{path} is damaged: a peer says so")
                )
            doubted = True
        _pause(fault or RetryableError(f"a peer cannot read {path}"), pause)


def _restore(path: epath.Path, abstract: Any) -> tuple[Any, dict, dict]:
    _together(path, lambda: integrity.check_files(path))  # each reads a share of them
    about = _together(path, lambda: _about(path))
    _together(path, lambda: _compare(path, abstract))

    def read():
        items = _load(path, {"state": abstract, "data": None, "config": None})
        if about:
            integrity.check_about(path, about, items["data"], items["config"])
            integrity.check_leaves(path, about, items["state"])
        return items

    items = _together(path, read)
    if about:
        _note_differences(path, about)
    return items["state"], items["data"], items["config"]


def _restore_part(path: epath.Path, abstract: Any, which: str) -> Any:
    _together(path, lambda: integrity.check_files(path, largest=integrity.SMALL))
    about = _together(path, lambda: _about(path))
    _together(path, lambda: _compare(path, {which: abstract}, only=which))

    def read():
        part = _load(path, {"state": {which: abstract}}, partial=True)["state"]
        if about:
            integrity.check_leaves(path, about, part)
        return part[which]

    return _together(path, read)


def _about(path: epath.Path) -> dict:
    """What the step says of itself; {} of one that is older than this file."""
    if not integrity.is_there(path / "about"):
        return {}
    about = _load(path, {"about": None})["about"]
    if not isinstance(about, dict) or not isinstance(about.get("fingerprints"), dict):
        raise UnreadableCheckpoint(f"{path} is damaged: about")
    integrity.refuse_newer(path, about)
    integrity.refuse_renamed(path, about)
    return about


def _note_differences(path: epath.Path, about: dict) -> None:
    if lines := list(processes.differing(about["made"], integrity.circumstances())):
        log.info(
            "%s was saved under other circumstances than now (%s): what follows agrees"
            " with the unbroken run to rounding, not to the bit",
            path,
            "; ".join(lines),
        )


def _require_space(directory: epath.Path, wanted: int) -> None:
    if files.remote(directory):
        return
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise UserError(
            f"{directory} has {free / 1e9:.3g} GB free: wanted {wanted / 1e9:.3g} GB,"
            " room for two checkpoints; free some, or write to another workdir"
        )


def _compare(path: epath.Path, abstract: Any, *, only: str | None = None) -> None:
    """Names, dtypes and shapes before any read: orbax would cast in silence."""
    with _readable(path):
        with _context():
            stored = ocp.metadata(path, "state").metadata
        if not jax.tree.leaves(stored):  # what orbax makes of damaged metadata
            raise ValueError("it holds no leaves")
    found = _described(stored if only is None else {only: stored.get(only, {})})
    wanted = _described(abstract)
    missing = [f"{n} is not stored" for n in wanted if n not in found]
    extra = [f"{n} is stored but not wanted" for n in found if n not in wanted]
    both = [n for n in wanted if n in found and wanted[n] != found[n]]
    differ = [f"{n} is {found[n]}, wanted {wanted[n]}" for n in both]
    if wrong := missing + extra + differ:
        listed = "; ".join(wrong[:LISTED]) + (" ..." if len(wrong) > LISTED else "")
        raise UserError(
            f"{path} does not fit: {len(missing)} missing, {len(extra)} extra, "
            f"{len(differ)} of another dtype or shape: {listed}"
        )


def _described(tree: Any) -> dict[str, str]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def _load(path: epath.Path, abstract: dict, *, partial: bool = False) -> dict:
    with _readable(path), _context(partial=partial):
        return ocp.load_checkpointables(path, abstract)


@contextlib.contextmanager
def _readable(path: epath.Path) -> Iterator[None]:
    """Whatever orbax fails to read inside, told apart: damage, storage, or access.

    Orbax's own error proves nothing: a read that failed once looks like a file that
    is cut. The sums of the files decide, where the step has them.
    """
    what = f"cannot read {path}"
    try:
        with _explained(what, UnreadableCheckpoint):
            yield
    except UnreadableCheckpoint as fault:
        code = os_code(fault.__cause__.__cause__ or fault.__cause__)
        denied = code not in (None, errno.ENOENT) or "PERMISSION_DENIED" in str(fault)
        if denied:
            raise UserError(f"{fault}; nothing was changed") from fault.__cause__
        if integrity.check_files(path, shared=False):
            reason = str(fault).removeprefix(f"{what}: ")
            raise RetryableError(
                f"{what}, though its files are as they were written: {reason}"
            ) from fault.__cause__
        raise


def _context(*, partial: bool = False) -> ocp.Context:
    """Orbax's settings: what is not the state is JSON, whatever its leaves are."""
    registry = ocp.handlers.local_registry()
    for name in JSON:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.async_options.create_directories_asynchronously = False  # fail at once
    # Of a leaf that several devices hold each writes a part, cut out by a program of
    # its own: for small leaves, compiling those takes longer than writing.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    context.pytree.loading.partial_load = partial
    return context


@contextlib.contextmanager
def _explained(what: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Any failure inside as one line; orbax puts the truth into the cause.

    Storage that does not answer is no damage and no mistake: RetryableError.
    """
    try:
        yield
    except (UserError, RunFailed, RetryableError):
        raise
    except Exception as e:
        truth = e.__cause__ or e
        reason = " ".join(str(truth).split())[:300]
        kind = RetryableError if passing(truth) else kind
        raise kind(f"{what}: {type(truth).__name__}: {reason}") from e
