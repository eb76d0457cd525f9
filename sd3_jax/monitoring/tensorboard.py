"""TensorBoard's event files of a run; a fault of theirs does not end it."""

import logging
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from sd3_jax import files
from sd3_jax.errors import RetryableError, UserError

log = logging.getLogger(__name__)
UPLOAD_EVERY = 30.0  # seconds


class EventFiles:
    """Scalars to WORKDIR/tensorboard, opened by the first of them.

    tensorboardX writes to buckets from a thread, which the first failed upload ends;
    the run would then wait for it. So events for a bucket go to a local folder, and
    their file is put into the bucket whole. What fails is warned of once, and no more
    is written: metrics.jsonl has all numbers.
    """

    def __init__(self, workdir: epath.PathLike, *, start_step: float):
        self.folder = f"{workdir}/tensorboard"
        self._start_step = start_step
        self._writer, self._local, self._failed = None, None, False
        self._uploaded = time.monotonic()

    def add(self, kind: str, values: Mapping[str, float], step: int) -> None:
        """One point of each curve KIND/NAME."""
        if self._failed:
            return
        try:
            if self._writer is None:
                self._open()
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            if self._local and time.monotonic() - self._uploaded > UPLOAD_EVERY:
                self._writer.flush()
                self._upload()
        except (OSError, UserError, RetryableError) as error:
            self._fail(error)

    def close(self) -> None:
        try:
            if self._writer:
                self._writer.close()
                if self._local and not self._failed:
                    self._upload()
        except (OSError, UserError, RetryableError) as error:
            self._fail(error)
        finally:
            if self._local:
                self._local.cleanup()

    def _open(self) -> None:
        from tensorboardX import SummaryWriter

        if files.remote(self.folder):
            self._local = tempfile.TemporaryDirectory(prefix="sd3_jax_tensorboard_")
        # purge_step hides what an earlier life wrote of the steps to come.
        redone = self._start_step + 1 if self._start_step < math.inf else None
        folder = self._local.name if self._local else self.folder
        self._writer = SummaryWriter(folder, purge_step=redone)

    def _upload(self) -> None:
        for path in sorted(Path(self._local.name).iterdir()):
            files.write_object(f"{self.folder}/{path.name}", path.read_bytes())
        self._uploaded = time.monotonic()

    def _fail(self, error: Exception) -> None:
        self._failed = True
        log.warning(
            "writing no more TensorBoard files in %s, metrics.jsonl has everything: %s",
            *(self.folder, error),
        )
