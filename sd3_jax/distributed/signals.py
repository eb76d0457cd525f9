"""Answers to Ctrl-C and SIGTERM while the main thread is in XLA's compiler."""

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

from sd3_jax.errors import INTERRUPTED

PATIENCE = 2.0  # seconds for a first Ctrl-C to end the run before it is answered


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Inside, a second Ctrl-C ends the process at once, whatever it does.

    Python runs a signal's handler once the main thread is in Python again, which it is
    not while XLA compiles. But it writes the signal's number to a pipe at once, and
    a thread reads it. SIGTERM is answered where a job has a handler for it.
    """
    # Python takes a wakeup descriptor from the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # set_wakeup_fd demands it
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_answer, args=(reading,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)  # the thread reads nothing more, and ends
        thread.join()
        os.close(reading)


def say(text: str) -> None:
    """One line on stderr, past Python's buffers; a closed stderr is not an error."""
    with contextlib.suppress(OSError):
        os.write(2, f"sd3-jax: {text}\n".encode())


def _answer(reading: int) -> None:
    interrupted = False
    while number := os.read(reading, 1):
        if number[0] == signal.SIGTERM:
            say(f"SIGTERM: stopping as soon as possible{_doing()}")
        if number[0] != signal.SIGINT:
            continue
        if interrupted:  # the second Ctrl-C
            os._exit(INTERRUPTED)
        interrupted = True
        # Most runs end by themselves in this time, and then need no advice.
        if not select.select([reading], [], [], PATIENCE)[0]:
            say(
                "Ctrl-C: stopping as soon as possible; press again to stop at"
                f" once{_doing()}"
            )


def _doing() -> str:
    # Looked up, not imported: it imports jax, which may not be loaded yet.
    watchdog = sys.modules.get("sd3_jax.distributed.watchdog")
    doing = watchdog.doing() if watchdog else ""
    return f" (now: {doing})" if doing else ""
