"""How far a run is: what ends it early and what that reports; a check of every step."""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator

import jax

from sd3_jax.distributed import processes
from sd3_jax.files import write_whole
from sd3_jax.monitoring.metrics import Metrics
from sd3_jax.training.nonfinite import NonFinite

log = logging.getLogger(__name__)


@dataclasses.dataclass
class RunProgress:
    """Counters of a run beside its TrainState; steps count from 1."""

    total_steps: int
    nonfinite: NonFinite
    step: int = 0  # the newest step that was begun, 0 before the first
    checked_step: int = 0  # the newest step whose loss was read
    batches_ahead: int = 0  # of the step number, after a change of the batch size
    max_hours: float = 0.0  # config.train.max_hours; 0: no limit
    stop_reason: str = "SIGTERM"  # what process 0 says if the run is stopped

    def stop_in_time(self, seconds: float) -> None:
        """Ask all processes to stop once process 0 has run for max_hours."""
        over = self.max_hours and seconds >= 3600 * self.max_hours
        # One clock decides, and asks once: all then agree on a step, as on SIGTERM.
        if over and jax.process_index() == 0 and self.stop_reason == "SIGTERM":
            self.stop_reason = f"config.train.max_hours = {self.max_hours:g} reached"
            processes.ask_to_stop()

    def describe_stop(self) -> str:
        """Where a signal stopped the run and from where the same command resumes.

        True once the save in flight has ended, for the next life resumes from it.
        """
        saved = self.nonfinite.last_saved
        where = f"at step {self.step} of {self.total_steps}"
        then = (
            f"resume from step {saved}" if saved else "start again from the beginning"
        )
        return (
            f"{where if self.step else 'at the start'}; run the same command to {then}"
        )

    @contextlib.contextmanager
    def explaining_interrupts(self) -> Iterator[None]:
        """Give a KeyboardInterrupt from inside the text of describe_stop."""
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.describe_stop()) from None


def check_step(
    step: int,
    values: dict | None,
    progress: RunProgress,
    record_names: Callable[[int], list[str]],
    metrics: Metrics,
) -> None:
    """Wait for a step and report one without an update; once for each step.

    `record_names(step - 1)` names the records of its batch. RunFailed once more steps
    than config.train.skip_nonfinite made no update.
    """
    if values is None or step == progress.checked_step:
        return
    progress.checked_step = step
    # The host waits for the device here: this copy is what bounds how far it is ahead.
    loss, norm = map(float, jax.device_get((values["loss"], values["grad_norm"])))
    nonfinite = progress.nonfinite
    if not nonfinite.is_one(step, loss, norm):
        return
    names = record_names(step - 1)
    words = nonfinite.words(step, loss, norm, names)
    log.warning("%s", words)
    row = {"loss": loss, "grad_norm": norm, "skipped": nonfinite.skipped}
    metrics.write(step, "nonfinite", row)
    if jax.process_index() == 0:
        text = json.dumps({"step": step, "words": words, "batch": names}, indent=1)
        path = metrics.workdir / "nonfinite" / f"step_{step:08d}.json"
        write_whole(path, text.encode())
    nonfinite.stop_beyond(words)
