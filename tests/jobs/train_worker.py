"""The entrypoint, killed by SIGKILL as step KILL_AT is logged, if that is set."""

import os
import signal
import sys

from sd3_jax import main, metrics


def mortal(write, last: int):
    def wrapped(self, step, kind, values):
        write(self, step, kind, values)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    return wrapped


if __name__ == "__main__":
    if "KILL_AT" in os.environ:
        last = int(os.environ["KILL_AT"])
        metrics.Metrics.write = mortal(metrics.Metrics.write, last)
    sys.exit(main.main())
