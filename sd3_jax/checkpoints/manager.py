"""Checkpoints of a run: atomic, asynchronous saves of {state, data position, config}.

Orbax writes a step. This module decides when a save is due and what its failure means;
`step_folders` knows which steps are complete, `restoring` reads them.
"""

import json
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from sd3_jax import files, tree
from sd3_jax.checkpoints import integrity, restoring, step_folders
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.checkpoints.orbax_io import orbax_context
from sd3_jax.distributed import processes
from sd3_jax.errors import RetryableError, RunFailed, UserError, explained
from sd3_jax.foreign_text import listed

LOOK = 5.0  # seconds between two looks for the folder that is saved to
log = logging.getLogger(__name__)


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
        self.directory = epath.Path(files.absolute(directory))
        self._every, self._keep, self._keep_every = every, keep, keep_every
        # One thread: what follows a save (sums, pruning) follows it in order.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._asked_step, self._preempted = -1, False
        self._grace, self._warned = grace, False
        self.step_seconds = 0.0  # the mean from one save to the next
        self._since: tuple[int, float] | None = None  # a step, and when it ended
        if jax.process_index() == 0:
            with explained(f"cannot write checkpoints to {self.directory}"):
                step_folders.prepare(self.directory)
                self._folder = step_folders.folder_identity(self.directory)
        self._last = self.latest() or 0

    def latest(self) -> int | None:
        """The newest complete step; process 0 looks, all processes get its answer."""
        return max(step_folders.shared_steps(self.directory), default=None)

    def require_space(self, abstract_state: Any) -> None:
        """Refuse to start where two more saves of such a state have no room."""
        leaves = jax.tree.leaves(abstract_state)
        size = sum(x.size * x.dtype.itemsize for x in leaves)
        processes.first(lambda: step_folders.require_space(self.directory, 2 * size))

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
                f"{self.directory} holds step {self._last} and this run is at {step}:"
                " resume from the newest step or write to another workdir"
            )
        # A save that failed is reported at the next step, not at the next save.
        if self._saving is not None and self._saving.done():
            self.wait()
        first, then = self._since = self._since or (step, time.monotonic())
        if not due:
            return False
        if step > first:
            self.step_seconds = (time.monotonic() - then) / (step - first)
        self.wait()  # one save at a time: each holds a copy of the state on the host
        began = time.monotonic()
        # A copy now: orbax writes JSON later, when the caller's may have moved on.
        data, config = json.loads(json.dumps([data, config]))
        path = self.directory / str(step)
        # Taken on the devices, before the copy to the host: a restore compares all of
        # the way from there and back.
        prints = tree.fingerprints(state)
        if finite and (names := [k for k, x in prints.items() if x.strange]):
            raise RunFailed(
                f"step {step} is not saved: {len(names)} of its arrays hold NaN or"
                f" infinities: {listed(names)}; the newest saved step is {self._last}"
            )
        about = integrity.about(step, prints, data, config)
        items = {"state": state, "data": data, "config": config, "about": about}
        with explained(f"saving {path} failed"), orbax_context():
            self._refuse_vanished()
            # overwrite: a folder of this number without its commit file may be there.
            response = ocp.save_checkpointables_async(path, items, overwrite=True)
        self._last, self._since = step, (step, time.monotonic())
        self._saving = self._thread.submit(self._finish, path, response, began)
        return True

    def due(self, step: int, *, force: bool = False) -> bool:
        """Whether `save` would save this step; all processes find the same."""
        # No clock: processes that disagreed here would wait for each other in the save.
        # The question about SIGTERM comes first, since it must be asked at every step.
        due = self.reached_preemption(step) or force or step % self._every == 0
        return due and 0 < step != self._last

    def restore(self, abstract_state: Any, step: int | None = None):
        """(state, data, config) of a step (the newest), laid out as abstract_state.

        Every value is compared with its fingerprint. Without `step`, one that is
        damaged is set aside and the one before is taken, if there is one.
        """
        self.wait()
        while True:
            path = step_folders.step_path(self.directory, step)
            try:
                return restoring.restore_step(path, abstract_state)
            except UnreadableCheckpoint as fault:
                if step is not None or not self._has_earlier(path):
                    raise
                self._set_aside(path, fault)

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes agreed to stop here; it stays true once it was."""
        # jax answers "stop" for one step only, and once: the answer is kept, since
        # `due`, `save` and the loop all ask for the same step.
        if step != self._asked_step:
            self._asked_step = step
            self._preempted |= processes.told_to_stop(step)
        return self._preempted

    def wait(self) -> None:
        """Wait until the save in flight is durable; raise what went wrong with it."""
        saving, self._saving = self._saving, None
        while saving is not None:
            try:
                return saving.result(timeout=LOOK)
            except TimeoutError:
                # Orbax's processes wait for each other inside a save: if the folder is
                # gone, until the watchdog ends them.
                with explained("saving failed"):
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
        """FileNotFoundError unless the folder is the one that the run began with.

        A save in flight makes a new folder instead of one that was removed, and
        the run would continue without the steps that it held.
        """
        if jax.process_index() != 0:
            return
        if step_folders.folder_identity(self.directory) != self._folder:
            raise FileNotFoundError(f"{self.directory} has vanished")

    def _has_earlier(self, path: epath.Path) -> bool:
        steps = step_folders.shared_steps(self.directory)
        return any(step < int(path.name) for step in steps)

    def _set_aside(self, path: epath.Path, fault: UserError) -> None:
        name = step_folders.set_aside(path, fault)
        self._last = self.latest() or 0
        log.warning(
            "%s: renamed it to %s; step %d is the newest now", fault, name, self._last
        )

    def _finish(self, path: epath.Path, response, began: float) -> None:
        with explained(f"saving {path} failed"):
            response.result()  # the commit file is written by now
            integrity.write_sums(path, jax.process_index(), jax.process_count())
        self._log_seconds(path, time.monotonic() - began)
        if jax.process_index() == 0:
            try:
                step_folders.prune(
                    self.directory,
                    saved=int(path.name),
                    keep=self._keep,
                    keep_every=self._keep_every,
                )
            # Not an error: the save itself is sound.
            except (OSError, UserError, RetryableError) as e:
                log.warning("cannot delete old steps in %s: %s", path.parent, e)

    def _log_seconds(self, path: epath.Path, seconds: float) -> None:
        """Log how long the save took; warn once if the save on SIGTERM may not fit.

        SIGTERM may come just after a save began: that save, the step in progress and
        the last save all come before SIGKILL.
        """
        if jax.process_index() != 0:
            return
        log.info("saved step %s in %.1f s", path.name, seconds)
        needed = 2 * seconds + self.step_seconds
        if self._grace is not None and needed > self._grace and not self._warned:
            self._warned = True
            log.warning(
                "two saves of %.1f s and a step of %.1f s take %.1f s, but SIGKILL"
                " follows SIGTERM after %g s (SD3_GRACE_S): a preempted run may lose"
                " up to %d steps; lower --config.checkpoint.every, or raise GRACE_S if"
                " the machine is not Spot",
                seconds,
                self.step_seconds,
                needed,
                self._grace,
                self._every,
            )
