"""One side's process: it reads commands as lines of JSON and answers in the same way.

It runs one command at a time and exits with the process that started it
doing: a thread waits for the end of the pipe.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable

import numpy as np

from sd3_jax.tools.benchmark import process_memory


def serve(side: Callable, **others: Callable) -> None:
    """Serves commands; `side(spec)` returns an object with first(), call(), outputs(),
    peak(), …, and `others` are further commands of this side."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it decides
    commands: queue.Queue = queue.Queue()
    # The thread notices the end of stdin while the main thread computes, and exits.
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    loaded, began = None, process_memory.now()
    while True:
        name, arguments = commands.get()
        try:
            if name == "load":
                start = time.perf_counter()
                loaded = side(arguments["spec"])
                answer = {"seconds": time.perf_counter() - start, "began": began}
                answer |= loaded.about()
            elif name in others:
                answer = others[name](**arguments)
            else:
                answer = COMMANDS[name](loaded, **arguments)
        # Any failure is an answer: the parent shows it in the table and goes on.
        except Exception as error:
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            answer = {"failed": text[:300]}
        answers.write(json.dumps(answer) + "\n")


def _read(commands: queue.Queue) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    os._exit(0)


def _check(loaded, path: str) -> dict:
    np.savez(path, **loaded.outputs())
    return {}


def _warm(loaded, times: int) -> dict:
    # The first call's peak includes compilation; the later one is the program's own.
    before = loaded.peak()
    for _ in range(times):
        loaded.call()
    return {"first_peak": before, "reset": loaded.reset_peak()}


def _run(loaded) -> dict:
    # Both clocks: seconds of CPU over seconds show how many cores were busy.
    start, cpu = time.perf_counter(), time.process_time()
    loaded.call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cpu": time.process_time() - cpu}


COMMANDS = {
    # Compilation and the first run, which a user waits for once.
    "first": lambda loaded: loaded.first(),
    "check": _check,
    "warm": _warm,
    "run": _run,
    "peak": lambda loaded: {"peak": loaded.peak()},
}
