"""Metrics of a run: metrics.jsonl, TensorBoard, and a progress bar or lines.

Each write is one flat JSON line. JSON has no NaN and no infinity: they are written as
"nan", "inf" and "-inf", so that every line parses and `read` loses nothing.
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.monitoring.progress import Pace
from sd3_jax.monitoring.tensorboard import EventFiles
from sd3_jax.monitoring.writers import Sender

log = logging.getLogger(__name__)
FILE = "metrics.jsonl"
HEAD = ("step", "kind", "time")  # of every line
PEAK_TFLOPS = {  # dense bfloat16 of one JAX device, by jax.Device.device_kind
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU7x": 1153.5,  # a chip is two JAX devices
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}


class Metrics:
    """Written by process 0: with Metrics(workdir, ...) as metrics: metrics.write(...).

    A run that resumes at `start_step` does the later steps again, so their lines go:
    every curve has one value a step. A job that is not the run itself, such as a later
    evaluation, gives None and only adds lines.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        total_steps: int,
        start_step: int | None = 0,
        process_index: int = 0,
        writers: Sequence[Sender] = (),
    ):
        self.workdir = epath.Path(workdir)
        self.total_steps = total_steps
        self.start_step = math.inf if start_step is None else start_step
        self.silent = process_index != 0
        self.writers = writers
        self._tensorboard = EventFiles(workdir, start_step=self.start_step)

    def __enter__(self) -> "Metrics":
        if not self.silent:
            # Steps after the checkpoint are done again, and would be in the file twice.
            _forget(self.workdir / FILE, after=self.start_step)
            self._log = open_log(self.workdir / FILE)
            # A bar needs a terminal; a log file gets plain lines.
            watch = _Bar if sys.stderr.isatty() else _Lines
            self._watch = watch(self.total_steps, self.start_step)
        return self

    def __exit__(self, *_):
        if not self.silent:
            self._watch.close()
            self._log.close()
            self._tensorboard.close()
        for writer in self.writers:
            writer.close()

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One line; numbers go to TensorBoard and the writers too."""
        if self.silent:
            return
        values = {name: _plain(value) for name, value in values.items()}
        row = {"step": int(step), "kind": kind, "time": round(time.time(), 3)}
        row |= {name: _jsonable(value) for name, value in values.items()}
        self._log.write(json.dumps(row) + "\n")
        self._watch.show(step, kind, values)
        # Services and TensorBoard draw numbers; texts and lists are in the file alone.
        if numbers := _numbers(values):
            for writer in self.writers:
                writer.write(step, kind, numbers)
            self._tensorboard.add(kind, numbers, step)


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The lines written so far; one that a kill cut off is left out."""
    path = epath.Path(workdir) / FILE
    if not files.remote(path) and path.is_dir():
        raise UserError(f"{path} is a folder: expected a file of metrics; move it away")
    rows = [row for _, row in _rows(path)] if path.exists() else []
    number = lambda x: float(x) if x in ("nan", "inf", "-inf") else x
    return [{name: number(value) for name, value in row.items()} for row in rows]


class Clock:
    """Times the steps between two log points, and the waits for data among them."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Start afresh, after an evaluation or anything else that is not training."""
        self._start, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Round next(batch): with clock.wait(): batch = next(examples)."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def summary(
        self,
        steps: int,
        images: int,
        *,
        flops: int | float | None = None,
        devices: int = 1,
        peak: int | float | None = None,
    ) -> dict[str, float]:
        """What was done since the last summary, all devices together, as rates.

        `peak` is the TFLOP/s of one device (PEAK_TFLOPS): without it there is no mfu.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)  # never divides by 0
        rates = {
            "images_per_s": images / seconds,
            "step_ms": 1e3 * seconds / max(steps, 1),
            "data_wait": min(self._waited / seconds, 1.0),
        }
        if flops:
            rates["tflops_per_device"] = flops / seconds / devices / 1e12
            if peak:
                rates["mfu"] = rates["tflops_per_device"] / peak
        self.reset()
        return rates


def open_log(path: epath.PathLike) -> "TextIO | _ObjectLog":
    """What lines are appended to, at any path of epath: write(text), close()."""
    path = epath.Path(path)
    if files.remote(path):
        return _ObjectLog(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", buffering=1, encoding="utf-8")  # a line at a time


class _ObjectLog:
    """Object stores cannot append: the file is written whole, at most every 30 s."""

    def __init__(self, path):
        self.path = path
        self.text = path.read_text() if path.exists() else ""
        self.put = time.monotonic()

    def write(self, text):
        self.text += text
        if time.monotonic() - self.put > 30:
            self.close()

    def close(self):
        files.write_whole(self.path, self.text.encode())
        self.put = time.monotonic()


class _Lines:
    """A plain line a write, for a log that is read later."""

    def __init__(self, total_steps, start_step):
        self.total, self.pace = total_steps, Pace()

    def show(self, step, kind, values):
        width = len(str(self.total))
        words = [f"step {step:>{width}}/{self.total}", *_words(kind, values)]
        if kind == "train":
            self.pace.mark(step)
            words += filter(None, [self.pace.time_left(self.total - step)])
        print("  ".join(words), file=sys.stderr, flush=True)

    def close(self):
        pass


class _Bar:
    """A live bar; what is not a training line is printed above it."""

    def __init__(self, total_steps, start_step):
        from rich import console, progress

        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=24),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            console=console.Console(stderr=True),
            speed_estimate_period=600,
        )
        done = min(start_step, total_steps)
        self.task = self.bar.add_task("", total=total_steps, completed=done)
        self.bar.start()

    def show(self, step, kind, values):
        words = "  ".join(_words(kind, values))
        if kind == "train":
            self.bar.update(self.task, completed=step, description=words)
        else:
            self.bar.console.print(
                f"step {step}  {words}", markup=False, highlight=False
            )

    def close(self):
        self.bar.stop()


def _words(kind, values):
    """What a person reads of a line: a few numbers, with units."""
    if kind == "goodput":
        return [f"goodput {values['productive']:.1%}"]
    if kind != "train":
        shown = [f"{name} {value:.4g}" for name, value in _numbers(values).items()]
        return [kind, *shown[:4], *(v for v in values.values() if isinstance(v, str))]
    words = {
        "loss": lambda x: f"loss {x:.4f}",
        "grad_norm": lambda x: f"grad {x:.2f}",
        "images_per_s": lambda x: f"{short(x)} img/s",
        "step_ms": lambda x: f"{short(x)} ms/step",
        "data_wait": lambda x: f"wait {x:.0%}",
        "mfu": lambda x: f"mfu {x:.1%}",
    }
    return [text(values[name]) for name, text in words.items() if name in values]


def short(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _forget(path, *, after):
    """Drop the lines of steps that will be done again, and one that was cut off."""
    if path.exists():
        lines = [f"{line}\n" for line, row in _rows(path) if row["step"] <= after]
        if (text := "".join(lines).encode()) != path.read_bytes():
            files.write_whole(path, text)


def _rows(path):
    """(line, row) of every line that is one of ours; the others are counted."""
    # Bytes that are no UTF-8 make a line strange, not the whole file unreadable.
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    rows = [(line, _row(line)) for line in lines]
    # A kill may have cut the last line: that is no reason to warn.
    strange = sum(row is None and bool(line.strip()) for line, row in rows[:-1])
    if strange:
        log.warning("%s: ignored lines that are not metrics: %d", path, strange)
    return [(line, row) for line, row in rows if row is not None]


def _row(line: str) -> dict | None:
    try:
        row = json.loads(line)
        kinds = [type(row[name]) for name in HEAD]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # type(), not isinstance: in Python true and false are ints.
    right = kinds[0] is int and kinds[1] is str and kinds[2] in (int, float)
    return row if right and 0 <= row["step"] < 2**53 else None


def _numbers(values):
    return {k: v for k, v in values.items() if isinstance(v, int | float)}


def _plain(value):
    """Python's own types: an array of one number becomes a float."""
    keep = isinstance(value, str | int | float | list | tuple | dict | None)
    return value if keep else float(value)


def _jsonable(value):
    special = isinstance(value, float) and not math.isfinite(value)
    return str(float(value)) if special else value
