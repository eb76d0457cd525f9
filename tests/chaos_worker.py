"""The entrypoint with a fault at step KILL_AT, NAN_AT, STUCK_AT or VANISH_AT."""

import os
import signal
import sys
import time

import numpy as np

from sd3_jax import main


def at(name: str) -> int:
    return int(os.environ.get(name, -1))


def poisoned(example, rows: range):
    """One value in one example of the step's batch is NaN."""

    def wrapped(self, i):
        made = example(self, i)
        if i == rows[3]:
            made["latents"] = made["latents"].copy()
            made["latents"][0, 0, 0] = np.nan
        return made

    return wrapped


def interrupted(write):
    def wrapped(self, step, kind, values):
        write(self, step, kind, values)
        if step == at("KILL_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "train" and step == at("STUCK_AT") and self.silent:  # process 1
            time.sleep(1000)
        if kind == "train" and step == at("VANISH_AT") and not self.silent:
            # At once, as a disk goes; deleted file by file it would race with a save.
            os.rename(f"{self.workdir}/checkpoints", f"{self.workdir}/gone")

    return wrapped


if __name__ == "__main__":
    from sd3_jax.data.synthetic import Synthetic
    from sd3_jax.monitoring import metrics

    metrics.Metrics.write = interrupted(metrics.Metrics.write)
    if at("NAN_AT") > 0:
        size = 8  # configs/sd3_2b.py:tiny
        rows = range(size * (at("NAN_AT") - 1), size * at("NAN_AT"))
        Synthetic.example = poisoned(Synthetic.example, rows)
    sys.exit(main.main())
