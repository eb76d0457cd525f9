"""What tests/test_hosts.py runs in two processes: python tests/hosts_worker.py VERB."""

import sys
import time

from sd3_jax import main
from sd3_jax.errors import UserError

main.join_processes()

import jax  # noqa: E402

from sd3_jax import hosts, watch  # noqa: E402

ME = jax.process_index()


def differ():
    hosts.agree("config", {"lr": 1e-4 * (1 + ME), "depth": 2})


def same():
    hosts.agree("config", {"lr": 1e-4, "depth": 2})


def first():
    """Process 0's mistake is everyone's."""
    assert hosts.first(lambda: [1, {"a": None}] if ME == 0 else 1 / 0) == [
        1,
        {"a": None},
    ]
    assert not hosts.all_well(ME == 0) and hosts.all_well(True)

    def fails():
        raise UserError("no such folder")

    hosts.first(fails)


def fail():
    """Process 1 has a bug, process 0 is in a collective that will never be."""
    if ME == 1:
        raise ValueError("a bug")
    jax.experimental.multihost_utils.sync_global_devices("never")


def stuck():
    """Process 1 stands still, and process 0 waits for it."""
    if ME == 1:
        watch.expect("step 7", 3)
        time.sleep(300)
    jax.experimental.multihost_utils.sync_global_devices("never")


def run():
    from jax.experimental import multihost_utils  # noqa: F401

    with watch.watching():
        globals()[sys.argv[1]]()


class Call:
    pass


if __name__ == "__main__":
    main.run = lambda call: run()
    main.parse = lambda argv: Call
    main.join_processes = lambda: None
    code = main.main(sys.argv[1:])
    sys.exit(code or 0)
