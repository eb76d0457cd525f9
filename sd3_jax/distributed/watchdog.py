"""The watchdog: it ends a process that hangs or whose peer has ended, with its stacks.

A collective whose peer has exited or stuck waits for ever, and so may a disk. A thread
checks the clock and whether a peer has reported its end.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from sd3_jax.distributed import processes
from sd3_jax.errors import RETRY

EVERY = 2.0  # seconds between two looks
LONG = 3600.0  # seconds for what may have a compilation or a large read in it
GRACE = 60.0  # seconds past a deadline until even a process without Python is ended
STACKS = 5.0  # seconds that faulthandler has to print stacks before SIGALRM
STUCK = "stuck: "  # how the reason of such an end begins; peers look for it


class Watch:
    """expect(activity, seconds) says by when the process will call it again.

    The clock is monotonic, so setting the time changes nothing. A process that was
    paused as a whole, with its virtual machine, gets that time back.
    """

    def __init__(self, every: float = EVERY):
        self._activity, self._deadline, self._armed = "", None, None
        self._every, self._over = every, threading.Event()
        # A daemon: the watch must not keep alive a process that ends by itself.
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")
        self._thread.start()

    def expect(self, activity: str, seconds: float | None) -> None:
        """`activity` begins now and takes at most so long; None: any time."""
        end = None if seconds is None else time.monotonic() + seconds
        self._seconds, self._activity, self._deadline = seconds, activity, end

    @property
    def activity(self) -> str:
        return self._activity

    def stop(self) -> None:
        self._over.set()
        self._thread.join()
        self._disarm()

    def _look(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(self._every):
            now = time.monotonic()
            # This thread sleeps for `every`: if it woke much later, all of the process
            # stood still, and what it waits for may be as late.
            paused, looked = now - looked - self._every, now
            if self._deadline is not None and paused > 5 * self._every:
                self._deadline += paused
            if self._deadline is not None and now > self._deadline:
                self._stuck()
            follow()
            self._arm()

    def _arm(self) -> None:
        """Print stacks and die without this thread, which may never get the GIL.

        faulthandler's own thread prints them. It could exit too, but with code 1, which
        says that a restart is of no use; the kernel's SIGALRM ends with 128 + 14.
        """
        deadline = self._deadline
        # Armed anew only for a new deadline: the loop sets one at each step, and this
        # thread sees the last of them.
        if deadline != self._armed:
            self._disarm()
            if deadline is not None:
                left = deadline - time.monotonic() + GRACE
                left = max(left, 0.001)  # 0 would disarm both
                faulthandler.dump_traceback_later(left, file=_stderr())
                signal.setitimer(signal.ITIMER_REAL, left + STACKS)
            self._armed = deadline

    def _disarm(self) -> None:
        if self._armed is not None:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
            self._armed = None

    def _stuck(self) -> None:
        reason = f"{STUCK}{self._activity} has taken more than {self._seconds:g} s"
        print(
            f"sd3-jax: error: {reason}; the stacks of all threads follow",
            file=sys.stderr,
        )
        _print_stacks()
        leave(reason, RETRY)


def follow(seconds: float = 0) -> None:
    """End this process if a peer reports its end within so many seconds."""
    deadline = time.monotonic() + seconds
    while (note := processes.ended()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if note is None:
        return
    process, reason, code = note
    print(
        f"sd3-jax: error: process {process} ended, so this one ends too: {reason}",
        file=sys.stderr,
    )
    # A stuck peer waits for somebody, perhaps for this process: show where it is.
    if reason.startswith(STUCK):
        _print_stacks()
    _exit(code)


def leave(reason: str, code: int) -> None:
    """End this process now, and have its peers follow.

    os._exit, since at a normal exit jax waits for the peers in a barrier, and they wait
    for this process's collectives.
    """
    processes.tell_end(reason, code)
    if processes.leads_others():
        time.sleep(2 * EVERY)  # the service that tells them lives in this process
    _exit(code)


def _exit(code: int) -> None:
    # os._exit flushes nothing, so what is logged and printed is flushed first.
    logging.shutdown()
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)  # skips atexit, and with it jax's barrier


def _print_stacks() -> None:
    sys.stderr.flush()
    faulthandler.dump_traceback(file=_stderr(), all_threads=True)


def _stderr():
    # faulthandler writes to a file descriptor; a replaced sys.stderr may have none.
    return sys.__stderr__ or sys.stderr


_watch: Watch | None = None


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Watch this process inside the block; main does so round every job."""
    global _watch
    before, _watch = _watch, Watch()
    try:
        yield
    finally:
        _watch.stop()
        _watch = before


def expect(activity: str, seconds: float | None) -> None:
    """Tell the watch, if there is one, what comes now and how long it may take."""
    if _watch is not None:
        _watch.expect(activity, seconds)


def doing() -> str:
    """The activity that was expected last, "" without a watch."""
    return _watch.activity if _watch is not None else ""
