"""Seconds that jax spends on compiling: what a rate of pictures must not include."""

import functools
import time

import jax

EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA, or reading its result


class CompileTime:
    """The union of the intervals that jax reports, since some of them are nested."""

    def __init__(self):
        self.intervals: list[tuple[float, float]] = []

    def add(self, event: str, seconds: float, **_) -> None:
        """Called by jax at the end of each phase."""
        if not event.startswith(EVENTS):
            return
        end = time.monotonic()
        begin = end - seconds
        # Phases end in order, so a phase covers the newest intervals or none. One that
        # reaches into an interval, as of another thread, is joined to it.
        while self.intervals and self.intervals[-1][1] > begin:
            begin = min(begin, self.intervals.pop()[0])
        self.intervals.append((begin, end))

    def total(self) -> float:
        return sum(end - begin for begin, end in self.intervals)


@functools.cache
def _listener() -> CompileTime:
    compile_time = CompileTime()
    jax.monitoring.register_event_duration_secs_listener(compile_time.add)
    return compile_time


def seconds() -> float:
    """Seconds of compilation in this process since the first call."""
    return _listener().total()
