"""Pictures that wait, in a bounded queue that hands out batches of one key."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from sd3_jax.serving.api_errors import ApiError

# The look also drops what has timed out while no request arrives.
IDLE = 1.0  # seconds between two looks of an idle queue


# eq=False: tickets are compared by identity, as two requests may be equal.
@dataclass(eq=False)
class Ticket:
    """A picture's place in the queue; `future` gets what the painter returns for it.

    Tickets of one `request` fail together. preview(step, latents_rgb) is called between
    its steps, of which there are `steps`.
    """

    row: Any
    key: Hashable
    request: str
    deadline: float  # of time.monotonic
    preview: Callable[[int, Any], None] | None = None
    steps: int = 0
    future: Future = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class BatchQueue:
    """put() by the threads of HTTP, take() by the one that paints."""

    def __init__(self, *, most: int, size: int, wait_s: float):
        self._most, self._size, self._wait = most, size, wait_s
        # A list and not a deque: batches are taken from its middle. It has at most
        # `most`.
        self._tickets: list[Ticket] = []
        self._closed = False
        self._changed = threading.Condition()
        self._seconds = 1.0  # of a batch, for Retry-After

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def closed(self) -> bool:
        return self._closed

    def put(self, tickets: Sequence[Ticket]) -> None:
        """All of a request's pictures, or a 429: half a request is of no use."""
        with self._changed:
            if self._closed:
                raise ApiError(
                    503, "the server is stopping", code="stopping", wait=self._seconds
                )
            self._drop()
            waiting = len(self._tickets)
            if waiting + len(tickets) > self._most:
                # A request for more than the queue holds would never be taken.
                raise ApiError(
                    429,
                    f"{waiting} pictures are waiting; the queue holds {self._most}",
                    code="queue_full",
                    # The batches that are ahead, times the seconds of one.
                    wait=self._seconds * -(-waiting // self._size),
                )
            self._tickets.extend(tickets)
            self._changed.notify()

    def take(self) -> list[Ticket]:
        """The next batch, of running futures; [] once the queue is closed and empty."""
        with self._changed:
            while True:
                self._drop()
                if self._closed and not self._tickets:
                    return []
                batch, pause = self._next(time.monotonic())
                if batch:
                    self._tickets = [x for x in self._tickets if x not in batch]
                    # False for what was cancelled since: it is simply not painted.
                    return [x for x in batch if x.future.set_running_or_notify_cancel()]
                self._changed.wait(pause)

    def painted(self, seconds: float) -> None:
        """How long the last batch took, for Retry-After."""
        # An exponential mean: the first batch after a compilation must not rule it for
        # long.
        self._seconds = 0.7 * self._seconds + 0.3 * seconds

    def close(self) -> None:
        """From now on nothing is added; what waits is still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        """Ends the queue: what waits fails with this error."""
        with self._changed:
            self._closed = True
            for ticket in self._tickets:
                if ticket.future.set_running_or_notify_cancel():
                    ticket.future.set_exception(error)
            self._tickets = []
            self._changed.notify_all()

    def _next(self, now: float) -> tuple[list[Ticket], float]:
        """(batch, 0) if one is full or has waited long enough, else ([], seconds)."""
        groups: dict[Hashable, list[Ticket]] = {}
        for ticket in self._tickets:  # in order of arrival, so the oldest is first
            groups.setdefault(ticket.key, []).append(ticket)
        pause = IDLE
        for group in groups.values():
            remaining = self._wait - (now - group[0].arrived)
            if len(group) >= self._size or remaining <= 0 or self._closed:
                return _alike(group, self._size), 0
            pause = min(pause, remaining)
        return [], pause

    def _drop(self) -> None:
        """Drops what was cancelled, and fails what has waited too long."""
        now, waiting = time.monotonic(), []
        for ticket in self._tickets:
            if ticket.future.cancelled():
                ticket.future.set_running_or_notify_cancel()  # wakes who waits for it
            elif ticket.deadline > now:
                waiting.append(ticket)
            elif ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(timed_out())
        self._tickets = waiting


def _alike(group: Sequence[Ticket], size: int) -> list[Ticket]:
    """The oldest ticket, and those whose steps are nearest to its."""
    first, *rest = group
    # A batch takes as many steps as its longest row. Sorting is stable, so that equal
    # steps keep their order of arrival, and the oldest is never passed over.
    rest.sort(key=lambda ticket: abs(ticket.steps - first.steps))
    return [first, *rest[: size - 1]]


def timed_out() -> ApiError:
    return ApiError(
        504, "the request was not answered within its time limit", code="timeout"
    )
