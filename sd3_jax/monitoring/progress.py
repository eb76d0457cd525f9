"""Progress of a long job: a live bar on a terminal, else a line every half minute."""

import sys
import time

EVERY = 30.0  # seconds between two lines


class Progress:
    """Counts bytes of `total`, and `things` by their name for the rate.

    with Progress("pictures", total=10**9) as progress:
        progress.add(things=1, bytes=2**20)
    """

    def __init__(self, things: str, *, total: int, done: int = 0, shown: bool = True):
        # At least 1: nothing to do is 100 % at once, not a division by zero.
        self.things, self.total, self.done = things, max(1, total), done
        # The pace is of this process: what was done before it began does not count.
        self.started, self.start_bytes = time.monotonic(), done
        self.count, self.last_shown = 0, 0.0
        self.bar = _bar() if shown and sys.stderr.isatty() else None
        self.shown = shown

    def __enter__(self):
        if self.bar:
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
            self.bar.start()
        return self

    def __exit__(self, *_):
        self.show(now=True)
        if self.bar:
            self.bar.stop()

    def add(self, *, things: int, bytes: int) -> None:
        self.count += things
        self.at(self.done + bytes)

    def at(self, done: int) -> None:
        """Set the bytes that are done, by this process or any other."""
        self.done = min(done, self.total)
        self.show()

    def show(self, now: bool = False) -> None:
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=self.words())
        elif self.shown and (now or time.monotonic() - self.last_shown > EVERY):
            self.last_shown = time.monotonic()
            print(f"{self.done / self.total:4.0%}  {self.words()}", file=sys.stderr)

    def words(self) -> str:
        """ "1,234 pictures, 56.7 a second, 12 min left"."""
        seconds = max(1e-6, time.monotonic() - self.started)
        pace = (self.done - self.start_bytes) / seconds
        left = (self.total - self.done) / pace if pace else None
        ends = "" if left is None else f", {duration(left)} left"
        return (
            f"{self.count:,} {self.things}, {self.count / seconds:.3g} a second{ends}"
        )


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _bar():
    from rich import console, progress

    return progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.description}"),
        console=console.Console(stderr=True),
    )
