"""Goodput: the kinds of work that a run's time went to, over all its restarts."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

KINDS = {  # with the words that people read
    "productive": "productive",
    "compile": "compile",
    "data_wait": "data",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation",
    "start_up": "start-up",
    "lost": "lost",
}
Row = Mapping[str, Any]  # of metrics.jsonl


class Goodput:
    """Every second from a run's first start on is of one kind.

    - productive: what the loop does besides what follows, for steps that count
    - compile: of the step; other programs belong to what calls them
    - data_wait: until a batch is there
    - checkpoint: the loop stands still for a save
    - evaluation: validation, samples, and the writing of a trace
    - start_up: from the program's start to the loop: imports, processes that wait for
      each other, parameters made or restored
    - lost: from the save that a later life resumes from until that life's start. It is
      the steps that are done again, what was spent on them, and the time in which
      nothing ran; but not the time after the last step of all, if more are asked for.
      A life that ended before its first line is lost whole, the first of all unseen.

    A life is one process's part of the run, from one start to the next. Its lines carry
    the sums so far, and the next life reads them: see `go_on`.
    """

    def __init__(self, began: float | None = None, *, clock: Callable = time.time):
        """`began` may lie before now. The clock is the wall's, which lives share."""
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.restarts = 0
        self._clock, self._kind = clock, "start_up"
        self._began = self._since = clock() if began is None else began

    def go_on(self, rows: Iterable[Row], step: int) -> None:
        """Add earlier lives, of which `rows` tell, to one that resumes from `step`."""
        lines = [r for r in rows if r["kind"] == "goodput" and r["step"] <= step]
        if not lines:
            return
        last = lines[-1]  # its sums are those of all lives before it
        for kind in KINDS:
            self.seconds[kind] += last.get(f"{kind}_s", 0.0)
        # The time after the last step is not lost if that step ended the run: nobody
        # waited. A later life was asked for more steps.
        if not last.get("finished"):
            self.seconds["lost"] += max(0.0, self._began - last["time"])
        self.restarts = last.get("restarts", 0) + 1

    def turn(self, kind: str) -> str:
        """From here on time is of this kind; before, it was of the one returned."""
        now = self._clock()
        self.seconds[self._kind] += max(0.0, now - self._since)  # clocks are set, too
        before, self._kind, self._since = self._kind, kind, now
        return before

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        before = self.turn(kind)  # kinds nest: the outer one goes on afterwards
        try:
            yield
        finally:
            self.turn(before)

    def lived(self) -> float:
        """Seconds since this life began, start-up included."""
        return self._clock() - self._began

    def shares(self) -> dict[str, float]:
        """Each kind's part of the time so far; they sum to 1."""
        self.turn(self._kind)
        total = sum(self.seconds.values()) or 1.0
        return {kind: seconds / total for kind, seconds in self.seconds.items()}

    def line(self, *, finished: bool = False) -> dict[str, float | bool]:
        """A line of metrics.jsonl: shares, which sum to 1, and seconds."""
        shares = self.shares()
        seconds = {f"{kind}_s": value for kind, value in self.seconds.items()}
        rest = {"restarts": self.restarts, "finished": finished}
        return shares | seconds | rest

    def words(self) -> str:
        """goodput 87.3 %: compile 5.1 %, data 2.0 %, ... of 1 h 02 min"""
        shares = self.shares()
        good = shares.pop("productive")
        rest = ", ".join(f"{KINDS[k]} {100 * x:.1f} %" for k, x in shares.items())
        total = duration(sum(self.seconds.values()))
        return f"goodput {100 * good:.1f} %: {rest} of {total}"


def table(rows: Iterable[Row]) -> list[tuple[str, float, float]]:
    """(name, share, seconds) of each kind, as the newest line of `rows` has it."""
    lines = [row for row in rows if row["kind"] == "goodput"]
    line = lines[-1] if lines else {}
    cells = [(KINDS[k], line.get(k), line.get(f"{k}_s")) for k in KINDS]
    # The file may be damaged or of another program.
    usual = lambda x: isinstance(x, int | float) and 0 <= x < 1e12
    return [row for row in cells if usual(row[1]) and usual(row[2])]


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    if hours < 1:
        return f"{int(minutes)} min {int(seconds) % 60:02} s"
    return f"{int(hours)} h {int(minutes) % 60:02} min"
