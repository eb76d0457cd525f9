"""The processes of the two sides, as their parent starts and asks them."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
GRACE = 5.0  # seconds to end by itself


class Failed(Exception):
    """A side failed; the text is its message."""


class Worker:
    """`python -m MODULE`, asked in lines of JSON; what it prints goes to a log."""

    def __init__(self, module: str, log: Path, env: Mapping[str, str] | None = None):
        self.module = module
        self._log = log.open("a")
        # Pipes for commands and answers; whatever libraries print goes to the log.
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(env),
            text=True,
            preexec_fn=end_with_parent,
        )

    def ask(self, command: str, **arguments) -> dict:
        try:
            self._process.stdin.write(json.dumps([command, arguments]) + "\n")
            self._process.stdin.flush()
            # Blocks until the side answers; there is no timeout, as compilation may
            # take long.
            line = self._process.stdout.readline()
        # The side has died; its exit code is read below.
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            why = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise Failed(f"{self.module} ended with {why}; see {self._log.name}")
        answer = json.loads(line)
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is not None:  # it may be in the middle of something
            self._process.kill()
        self.close()


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with the package on PYTHONPATH."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(more or {})}


def end_with_parent() -> None:
    """Runs in the child before exec: Linux kills it when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
