"""A run's metrics in Weights & Biases and MLflow, beside metrics.jsonl.

Each writer works in a thread of its own, so that a service that is slow, full or gone
costs numbers there and never a step. Their own environment variables say where to:
WANDB_PROJECT, WANDB_MODE, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on.
"""

import importlib
import json
import logging
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

from etils import epath

from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
IDS = "writers.json"  # in workdir: the services' names of this run, to go on with it
WAITING = 10_000  # numbers' lines that a writer may be behind before some are dropped
CLOSING = 60.0  # seconds for what is still to be sent when a run ends


class Writer(Protocol):
    """A service that takes metrics; all methods are called from one thread."""

    def open(self, name: str, run_id: str | None, config: Mapping[str, Any]) -> str:
        """Begin a run of this name, or resume `run_id`; return the run's id."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by "kind/name"."""

    def close(self) -> None:
        """Send what is left."""


class Wandb:
    def __init__(self, module: ModuleType):
        self._wandb = module

    def open(self, name, run_id, config):
        project = os.environ.get("WANDB_PROJECT", "sd3_jax")
        self._run = self._wandb.init(
            project=project, name=name, id=run_id, resume="allow", config=dict(config)
        )
        # An axis of its own: by default steps may only grow, and a run that goes on
        # from a checkpoint does some of them again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return self._run.id

    def write(self, step, values):
        self._run.log({"step": step, **values})

    def close(self):
        self._run.finish()


class Mlflow:
    def __init__(self, module: ModuleType):
        self._mlflow = module

    def open(self, name, run_id, config):
        named = {"run_id": run_id} if run_id else {"run_name": name}
        run = self._mlflow.start_run(**named)
        self._mlflow.log_dict(dict(config), "config.json")
        return run.info.run_id

    def write(self, step, values):
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self):
        self._mlflow.end_run()


WRITERS = {"wandb": Wandb, "mlflow": Mlflow}


def open_all(
    names: Sequence[str], workdir: epath.PathLike, config: Mapping[str, Any]
) -> list["Sender"]:
    """The writers of these names, at work; UserError for a package that is missing."""
    return [
        Sender(name, WRITERS[name](module), workdir, config)
        for name, module in clients(names).items()
    ]


def clients(names: Sequence[str]) -> dict[str, ModuleType]:
    """The services' packages by name; UserError for one that is not installed."""
    modules = {}
    for name in names:
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            raise _not_installed(name, str(error)) from None
        # wandb writes its files to ./wandb. Without the package, Python imports that
        # folder as a namespace package, which has no file and no functions.
        spec = modules[name].__spec__
        if spec is not None and spec.origin is None:
            (folder, *_) = spec.submodule_search_locations
            raise _not_installed(name, f"{folder} is a folder, not the package")
    return modules


def _not_installed(name: str, reason: str) -> UserError:
    return UserError(
        f'config.train.writers: "{name}": {reason}; run pip install {name}'
    )


class Sender:
    """A writer's thread. The first failure is logged, all of them are counted."""

    def __init__(
        self,
        name: str,
        writer: Writer,
        workdir: epath.PathLike,
        config: Mapping[str, Any],
    ):
        self.name, self.failed, self.total = name, 0, 0
        self._writer, self._opened = writer, False
        self._workdir, self._config = epath.Path(workdir), config
        self._waiting: queue.Queue = queue.Queue(WAITING)
        # A daemon: a service that never answers must not hold the process at its end.
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Queue numbers to be sent; return at once."""
        self.total += 1
        named = {f"{kind}/{name}": value for name, value in values.items()}
        try:
            self._waiting.put_nowait((int(step), named))
        except queue.Full:  # a step must not wait for a service
            self._fail("it is too slow")

    def close(self, seconds: float = CLOSING) -> None:
        """Wait for what is left to be sent, for so long at most."""
        try:
            self._waiting.put(None, timeout=seconds)  # the end of the queue
            self._thread.join(seconds)
        except queue.Full:
            pass
        if self._thread.is_alive():
            log.warning("%s: not everything was sent within %g s", self.name, seconds)
        if self.failed:
            log.warning(
                "%s lacks %d of %d lines; metrics.jsonl has all of them",
                *(self.name, self.failed, self.total),
            )

    def _work(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                # Opened here, not by the constructor: it takes a service seconds, and
                # is tried again with the next line if it failed.
                if not self._opened:
                    self._open()
                self._writer.write(*line)
            except Exception as error:  # whatever a service's client raises
                self._fail(f"{type(error).__name__}: {error}")
        try:
            if self._opened:
                self._writer.close()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}", lines=0)

    def _open(self) -> None:
        path = self._workdir / IDS
        ids = lambda: json.loads(path.read_text()) if path.exists() else {}
        known_id = ids().get(self.name)  # a resumed run is the same run there
        run_id = self._writer.open(self._workdir.name, known_id, self._config)
        self._opened = True
        with LOCK:  # another writer may have put its own there meanwhile
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(ids() | {self.name: run_id}))

    def _fail(self, reason: str, lines: int = 1) -> None:
        if not self.failed:
            reason = " ".join(reason.split())[:300]
            log.warning("%s: %s; the run continues without it", self.name, reason)
        self.failed += lines


LOCK = threading.Lock()
