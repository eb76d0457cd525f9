"""An xprof trace of a few steps of a run, written by every process."""

import importlib.util
import logging
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.files import write_whole

log = logging.getLogger(__name__)


def require_sound_profiler() -> None:
    """UserError where libtpu is loaded and has no TPU: its tracer ends the process.

    jax loads it wherever it is installed and JAX_PLATFORMS allows "tpu".
    """
    # jax adds its flags to `config` at run time.
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    allowed = (platforms or "tpu").split(",")
    platform = jax.devices()[0].platform
    if platform != "tpu" and "tpu" in allowed and importlib.util.find_spec("libtpu"):
        raise UserError(
            "config.profile.start: libtpu is installed but jax found no TPU, so its"
            f" profiler would crash; set JAX_PLATFORMS={platform}, or uninstall libtpu"
        )


class Trace:
    """Traces steps start, start + 1, ...; those before a restart are not repeated.

    jax writes to a temporary folder, whose files are copied. By itself it knows no
    object store but Google's and cannot recover from a failed write. It names a trace
    by the second and a file by the host, so processes that share a host overwrite each
    other, and those that start a second apart end in two traces.
    """

    def __init__(
        self, folder: epath.Path, *, start: int, steps: int, done: int, total: int
    ):
        """`done` steps of `total` lie behind; a start of 0 traces nothing."""
        span = range(max(start, done + 1), min(start + steps, total + 1))
        self.steps = span if start else range(0)
        if self.steps:
            require_sound_profiler()
        if start and not span:
            log.info("no trace: this run resumes after step %d", done)
        self.folder, self._local = folder, None

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def begin(self, step: int, before: Any) -> None:
        """Call it before every step, with the values of the step before."""
        if step in self.steps and self._local is None:
            # The loop is a step ahead: without this wait the trace would begin in the
            # middle of a step that is not to be in it.
            jax.block_until_ready(before)
            self._local = tempfile.TemporaryDirectory(prefix="sd3-trace-")
            self._run = f"step_{step:08d}"
            jax.profiler.start_trace(self._local.name)

    def ends(self, step: int) -> bool:
        return step + 1 == self.steps.stop  # range.stop is one past the last step

    def stop(self) -> None:
        """Write the trace if one runs; a failed write is logged, the run continues."""
        if self._local is None:
            return
        to = self.folder / "plugins" / "profile" / self._run  # where xprof looks
        with self._local as local:
            try:
                jax.profiler.stop_trace()
                for path in Path(local).rglob("*.*"):
                    name = f"{jax.process_index()}.{path.name}"
                    write_whole(to / name, path.read_bytes())
                log.info("wrote a trace to %s", to)
            except (OSError, RuntimeError) as error:  # jax's own are RuntimeErrors
                log.warning("no trace in %s: %s", to, error)
        self._local, self.steps = None, range(0)
