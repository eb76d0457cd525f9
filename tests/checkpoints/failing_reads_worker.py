"""Restores a directory's newest step while reads of one file after another fail.

LD_PRELOAD=failing_reads.so python failing_reads_worker.py DIRECTORY COUNTER PLAN

PLAN is JSON, [[part of a path, errno, reads that fail], …]; for each the answer is
[the error's kind, its text, steps]; the kind is "" where step 2 was restored.
"""

import json
import os
import sys
from pathlib import Path

from checkpoints.checkpoint_worker import POLICY, abstract_state, assert_bits

from sd3_jax.checkpoints import manager, step_folders

step_folders.PAUSES = (0.0,) * len(step_folders.PAUSES)


def attempt(directory: Path, counter: Path, match: str, code: int, count: int):
    abstract = abstract_state(1)
    os.environ.update(FAIL_MATCH=match, FAIL_ERRNO=str(code), FAIL_COUNT=str(counter))
    counter.write_text(f"{count:<12}")
    kind = text = ""
    try:
        with manager.Checkpoints(directory, **POLICY) as checkpoints:
            state, data, _ = checkpoints.restore(abstract)
        assert data == {"next_step": 2}
        assert_bits(state, abstract, seed=2)
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    left = int(counter.read_text())
    counter.write_text(f"{0:<12}")
    return kind, text, count - left, sorted(path.name for path in directory.iterdir())


if __name__ == "__main__":
    folder, failures = Path(sys.argv[1]), Path(sys.argv[2])
    print(
        json.dumps([attempt(folder, failures, *row) for row in json.loads(sys.argv[3])])
    )
