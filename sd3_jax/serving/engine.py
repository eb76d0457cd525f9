"""The thread that paints: it takes batches from the queue and answers their futures."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sd3_jax.distributed import watchdog
from sd3_jax.errors import RETRY, UserError, exit_code
from sd3_jax.serving.api_errors import ApiError
from sd3_jax.serving.batch_queue import BatchQueue, Ticket
from sd3_jax.serving.service_metrics import ServiceMetrics

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Pictures u8 (n, h, w, 3) of n rows, or None if none was painted.

    `failures` says by row why it has no picture, `flags` are the filter's verdicts.
    """

    images: np.ndarray | None
    failures: dict[int, str]
    flags: list[str]


class Picture(NamedTuple):
    """A painted picture, its row in the batch and the batch's size."""

    image: np.ndarray
    flag: str
    slot: tuple[int, int]


class Engine:
    """paint(rows) -> Batch runs in this thread alone, on at most `size` rows.

    What the thread cannot recover from is `fault`: it ends the thread, and the server.
    """

    def __init__(
        self,
        paint: Callable[[Sequence[Any]], Batch],
        queue: BatchQueue,
        metrics: ServiceMetrics,
        *,
        size: int,
        several: bool = False,
    ):
        self.fault: Exception | None = None
        self._paint, self._queue, self._metrics = paint, queue, metrics
        self._size, self._several = size, several
        self._running: list[Ticket] = []
        # One thread for all programs: JAX would run two at once, and neither their
        # memory nor the order of collectives on several hosts would be known. A daemon,
        # so that a stuck device does not keep the process from its exit.
        self._thread = threading.Thread(target=self._run, name="painter", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def join(self, seconds: float) -> bool:
        """Whether the thread has ended within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def preview(self, step: Any, t: Any, rgb: Any) -> None:
        """Called by the program after each step, from a thread of jax."""
        # zip ends with the tickets: the rows that fill up a batch have none. A row with
        # fewer steps than the longest is finished before the loop ends.
        for ticket, row in zip(self._running, rgb):
            if ticket.preview is not None and int(step) < ticket.steps:
                ticket.preview(int(step), row)

    def _run(self) -> None:
        try:
            while True:
                # None: an idle server waits without a limit, which must not look like a
                # hang.
                watchdog.expect("requests", None)
                # [] also means that every ticket of a batch was cancelled at the last
                # moment.
                if not (batch := self._queue.take()):
                    if not len(self._queue) and self._queue.closed:
                        return
                    continue
                watchdog.expect("a batch of pictures", watchdog.LONG)
                self._answer(batch)
        except Exception as error:
            # jobs/serve.py raises the fault in the main thread, whose exit code decides
            # whether a supervisor starts the server again.
            log.exception("the painter's thread ends")
            self.fault = error
            self._queue.fail(
                ApiError(503, "the server is stopping after a fault", code="stopping")
            )

    def _answer(self, batch: list[Ticket]) -> None:
        now = time.monotonic()
        for ticket in batch:
            self._metrics.seconds.labels("queue").observe(now - ticket.arrived)
        self._metrics.batch_rows.observe(len(batch))
        self._running = batch
        try:
            self._deliver(batch, self._painted(batch))
        except UserError as error:
            self._alone(batch, error)
        except Exception as error:
            self._fail(batch, error)
            # Processes may have parted, and a lost device stays lost: start again.
            if self._several or exit_code(error) == RETRY:
                raise
            log.exception("a batch failed")
        finally:
            self._running = []
            self._queue.painted(time.monotonic() - now)

    def _painted(self, batch: Sequence[Ticket]) -> Batch:
        began = time.monotonic()
        painted = self._paint([ticket.row for ticket in batch])
        self._metrics.seconds.labels("paint").observe(time.monotonic() - began)
        return painted

    def _deliver(self, batch: Sequence[Ticket], painted: Batch) -> None:
        for i, ticket in enumerate(batch):
            # A UserError here means a 400: the request asked for what cannot be
            # painted.
            if painted.images is None or i in painted.failures:
                reason = painted.failures.get(i, "the picture cannot be painted")
                ticket.future.set_exception(UserError(reason))
                continue
            self._metrics.pictures.inc()
            flag = painted.flags[i] if painted.flags else ""
            # Copied: a view would keep the whole batch for as long as one picture.
            image = painted.images[i].copy()
            ticket.future.set_result(Picture(image, flag, (i, self._size)))

    def _alone(self, batch: Sequence[Ticket], error: UserError) -> None:
        """Each request by itself, since the fault of one fails all of its batch."""
        requests = dict.fromkeys(ticket.request for ticket in batch)
        for request in requests:
            tickets = [ticket for ticket in batch if ticket.request == request]
            if len(requests) == 1:
                self._fail(tickets, error)
                return
            try:
                self._running = tickets
                self._deliver(tickets, self._painted(tickets))
            except UserError as reason:
                self._fail(tickets, reason)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        if not isinstance(error, UserError):
            # What went wrong inside is the log's, not the client's.
            error = ApiError(500, "the batch could not be painted", code="server_error")
        for ticket in tickets:
            if not ticket.future.done():
                ticket.future.set_exception(error)
