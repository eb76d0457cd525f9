"""The sides of a case take turns on the clock, once they are found to agree."""

import contextlib
import logging
import time
from pathlib import Path

import numpy as np

from sd3_jax.tools.benchmark import cases
from sd3_jax.tools.benchmark.cases import Spec
from sd3_jax.tools.benchmark.side_processes import Failed, Worker

log = logging.getLogger(__name__)
OURS, THEIRS = "sd3_jax.tools.benchmark.jax_side", "sd3_jax.tools.benchmark.torch_side"
# Beside PyTorch on one GPU: jax would take three quarters of its memory at once.
SHARING = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Turns:
    """Loads a case on its sides, compares their outputs and times them in turn.

    Results go into `entry`, the case's dictionary in benchmark.json.
    """

    def __init__(
        self, weights: Path, log: Path, *, repeats: int, warmup: int, pause: float
    ):
        self.weights, self.log = weights, log
        self.repeats, self.warmup, self.pause = repeats, warmup, pause

    def beside(self, spec: Spec, sides: list[str], entry: dict) -> None:
        """Loads all sides, and times them in turn: A B A B."""
        with contextlib.ExitStack() as stack:
            ready = {}
            for side in sides:
                worker = stack.enter_context(self.worker(side))
                with self.failing(entry, side):
                    self.prepare(worker, side, spec, entry)
                    ready[side] = worker
            self.compare(spec, entry)
            ready = {k: x for k, x in ready.items() if k not in entry["refused"]}
            # Turn by turn, so that a machine that slows down does so for both sides.
            for _ in range(self.repeats):
                for side, worker in list(ready.items()):
                    with self.failing(entry, side):
                        self.turn(worker, side, entry)
                        continue
                    # Reached only after a failure: `continue` skips it, and `failing`
                    # swallows the error.
                    del ready[side]
            for side, worker in ready.items():
                with self.failing(entry, side):
                    entry["sides"][side] |= worker.ask("peak")

    def apart(self, spec: Spec, sides: list[str], entry: dict) -> None:
        """Times one side after the other, if both do not fit in memory together."""
        for side in sides:
            with self.worker(side) as worker, self.failing(entry, side):
                self.prepare(worker, side, spec, entry)
                self.compare(spec, entry)
                if side in entry["refused"]:
                    continue
                for _ in range(self.repeats):
                    self.turn(worker, side, entry)
                entry["sides"][side] |= worker.ask("peak")

    def worker(self, side: str) -> Worker:
        module = OURS if side == "ours" else THEIRS
        return Worker(module, self.log, SHARING)

    @contextlib.contextmanager
    def failing(self, entry: dict, side: str):
        """Records a side's failure in the table; the other sides go on."""
        try:
            yield
        except Failed as error:
            log.warning("%s, %s: %s", entry["name"], side, error)
            entry["sides"].setdefault(side, {})["failed"] = str(error)
            entry["turns"].pop(side, None)

    def prepare(self, worker: Worker, side: str, spec: Spec, entry: dict) -> None:
        """Loads and compiles a side, saves its outputs, and warms it up."""
        side_result = entry["sides"][side] = {}
        # "eager" and "compile" are modes of PyTorch's side.
        spec = spec if side == "ours" else {**spec, "mode": side}
        loaded = worker.ask("load", spec=spec)
        side_result["load"] = loaded.pop("seconds")
        side_result |= loaded | worker.ask("first")
        worker.ask("check", path=str(self.outputs(side)))
        side_result |= worker.ask("warm", times=self.warmup)
        entry["turns"][side] = []

    def outputs(self, side: str) -> Path:
        return self.weights / f"{side}.npz"

    def compare(self, spec: Spec, entry: dict) -> None:
        """Refuses sides whose outputs differ from ours: they are not timed."""
        limit = cases.TOLERANCE[spec["dtype"]]
        for side in entry["turns"]:
            if "ours" in (side, *entry["refused"]) or side in entry["gaps"]:
                continue
            if "ours" not in entry["turns"]:
                continue
            # Closed at once: the next case writes files of the same names.
            with (
                np.load(self.outputs("ours")) as ours,
                np.load(self.outputs(side)) as theirs,
            ):
                error, where = cases.gap(dict(ours), dict(theirs))
            entry["gaps"][side] = error
            if error > limit:
                words = (
                    f"{where} differs by {error:.1e}, at most {limit:.0e} is allowed"
                )
                entry["refused"][side] = words
                log.warning("%s, %s: %s", entry["name"], side, words)

    def turn(self, worker: Worker, side: str, entry: dict) -> None:
        # The other side's threads fall asleep meanwhile, and do not compete for cores.
        time.sleep(self.pause)
        taken = worker.ask("run")
        entry["turns"][side].append(taken["seconds"])
        entry["sides"][side].setdefault("cpu", []).append(taken["cpu"])
