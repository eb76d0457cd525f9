"""Run in two processes by tests/distributed/test_processes.py, with a verb."""

import re
import sys
import time

from sd3_jax import main
from sd3_jax.config import command_line
from sd3_jax.errors import UserError

main.join_processes()

import jax  # noqa: E402
from jax.experimental.multihost_utils import sync_global_devices  # noqa: E402

from sd3_jax.distributed import processes, watchdog  # noqa: E402

ME = jax.process_index()


def differ():
    processes.agree("config", {"lr": 1e-4 * (1 + ME), "depth": 2})


def same():
    processes.agree("config", {"lr": 1e-4, "depth": 2})


def first():
    """Process 0's mistake is everyone's."""
    assert processes.first(lambda: [1, {"a": None}] if ME == 0 else 1 / 0) == [
        1,
        {"a": None},
    ]
    assert not processes.all_well(ME == 0) and processes.all_well(True)
    rows = lambda mine: [f"{i} of {ME}" for i in mine]
    assert processes.shared(rows, 3) == ["0 of 0", "1 of 1", "2 of 0"]
    assert processes.shared(rows if ME == 0 else None, 1) == ["0 of 0"]  # none for 1

    def fails():
        raise UserError("no such folder")

    processes.first(fails)


def fail():
    """Process 1 has a bug, process 0 is in a collective that will never be."""
    if ME == 1:
        raise ValueError("a bug")
    sync_global_devices("never")


def stuck():
    """Process 1 stands still, and process 0 waits for it."""
    if ME == 1:
        watchdog.expect("step 7", 3)
        time.sleep(300)
    sync_global_devices("never")


def waits():
    """Process 1 stands still without a bound; process 0, which waits, has one."""
    if ME == 1:
        time.sleep(300)
    watchdog.expect("step 8", 3)
    sync_global_devices("never")


def mistake():
    """Process 1's collective fails before process 0 tells its mistake."""
    if ME == 0:
        time.sleep(1)
        raise UserError("no such shard")
    raise jax.errors.JaxRuntimeError("UNAVAILABLE: Connection reset by peer")


def gil():
    """C code that holds the GIL, so that no Python thread runs."""
    watchdog.GRACE = 0.0
    watchdog.expect("step 9", 3)
    time.sleep(2 * watchdog.EVERY)  # the watch arms itself at its next look
    re.match(r"(a+)+$", "a" * 40 + "b")


def run(call):
    with watchdog.watching():
        globals()[call.job]()


if __name__ == "__main__":  # main's own way out, round a verb in place of a job
    main.join_processes = lambda: None
    main.parse, main.run = (lambda argv: command_line.Call(argv[0], None, "")), run
    sys.exit(main.main(sys.argv[1:]))
