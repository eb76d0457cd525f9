"""Progress of a long job: a live bar on a terminal, else a line every half minute."""

import sys
import time
from collections import deque

EVERY = 30.0  # seconds between two lines
WINDOW, SPACING = 32, 0.5  # marks that a rate is taken over, and seconds between two


class Pace:
    """An amount a second, over the last WINDOW marks.

    The first mark only starts the clock, because compilation is part of the first item.
    """

    def __init__(self):
        self.marks: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def mark(self, amount: float) -> None:
        """`amount` in all is done now."""
        # Items that take milliseconds share a mark, or the window would be too short.
        if len(self.marks) > 1 and self.marks[-1][0] - self.marks[-2][0] < SPACING:
            self.marks.pop()
        self.marks.append((time.monotonic(), amount))

    def rate(self) -> float | None:
        """The amount a second; None before the second mark, or if nothing was done."""
        if len(self.marks) < 2:
            return None
        (begin, before), (end, after) = self.marks[0], self.marks[-1]
        return (after - before) / (end - begin) if end > begin else None

    def time_left(self, amount: float) -> str:
        """ "12 min left", where `amount` remains; "" while the rate is unknown."""
        rate = self.rate()
        return f"{duration(amount / rate)} left" if rate and amount else ""


class Progress:
    """Counts bytes of `total`, and `things` by their name for the rate.

    with Progress("pictures", total=10**9) as progress:
        progress.add(things=1, bytes=2**20)
    """

    def __init__(self, things: str, *, total: int, done: int = 0, shown: bool = True):
        # At least 1: nothing to do is 100 % at once, not a division by zero.
        self.things, self.total, self.done = things, max(1, total), done
        self.started = time.monotonic()
        # The paces are of this process: what was done before it began does not count.
        self.count_pace, self.byte_pace = Pace(), Pace()
        self.count, self.last_shown = 0, 0.0
        self.bar = _bar() if shown and sys.stderr.isatty() else None
        self.shown = shown

    def __enter__(self):
        if self.bar:
            self.task = self.bar.add_task("", total=self.total, completed=self.done)
            self.bar.start()
        return self

    def __exit__(self, *_):
        self.show(last=True)
        if self.bar:
            self.bar.stop()

    def add(self, *, things: int, bytes: int) -> None:
        self.count += things
        self.count_pace.mark(self.count)
        self.at(self.done + bytes)

    def at(self, done: int) -> None:
        """Set the bytes that are done, by this process or any other."""
        self.done = min(done, self.total)
        self.byte_pace.mark(self.done)
        self.show()

    def show(self, last: bool = False) -> None:
        words = self.summary() if last else self.words()
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=words)
        elif self.shown and (last or time.monotonic() - self.last_shown > EVERY):
            self.last_shown = time.monotonic()
            print(f"{self.done / self.total:4.0%}  {words}", file=sys.stderr)

    def words(self) -> str:
        """ "1,234 pictures, 56.7 a second, 12 min left"."""
        rate = self.count_pace.rate()
        parts = [self.counted()]
        parts += [f"{rate:.3g} a second"] if rate else []
        left = self.byte_pace.time_left(self.total - self.done)
        return ", ".join([*parts, left] if left else parts)

    def summary(self) -> str:
        """ "1,234 pictures in 22 s"."""
        seconds = time.monotonic() - self.started
        return f"{self.counted()} in {duration(seconds)}"

    def counted(self) -> str:
        things = self.things.removesuffix("s") if self.count == 1 else self.things
        return f"{self.count:,} {things}"


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
