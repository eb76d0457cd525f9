"""Times from a command to its first effect, each in a new process."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from sd3_jax.tools.benchmark import machine
from sd3_jax.tools.benchmark.side_processes import Failed, end_with_parent, environment

IMPORTS = (
    "import sd3_jax",
    "from sd3_jax import generate",
    "from diffusers import StableDiffusion3Pipeline",
)
MAIN = (sys.executable, "-m", "sd3_jax.main")
RECIPE = "configs/quickstart.py:tiny"
LONG = 600.0  # seconds, for any of them
LOOK = 0.01


def imports(log: Path) -> Iterator[tuple[str, float]]:
    """Times of starting Python, and of imports of ours and theirs if installed."""
    yield "python", seconds([sys.executable, "-c", ""], log)
    for code in IMPORTS:
        if "diffusers" not in code or machine.present("diffusers"):
            yield code, seconds([sys.executable, "-c", code], log)
    yield "sd3-jax --help", seconds([*MAIN, "--help"], log)


def jobs(log: Path) -> Iterator[tuple[str, float]]:
    """Times from command to first training step and to first picture, with an empty
    cache of compiled programs and with a filled one."""
    # A fresh cache folder: "cold" must find no compiled program.
    with tempfile.TemporaryDirectory(prefix="sd3-benchmark-") as scratch:
        cache = Path(scratch, "cache")
        env = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        for state in ("cold", "cached"):
            workdir = Path(scratch, state)
            common = [f"--config={RECIPE}", f"--workdir={workdir}"]
            rest = ["log_every=1", "eval_every=9", "sample_every=9"]
            few = [f"--config.train.{word}" for word in ("steps=1", *rest)]
            train = [*MAIN, "train", *common, *few]
            lines = workdir / "metrics.jsonl"
            done = lambda path=lines: path.exists() and '"train"' in path.read_text()
            yield f"first step, {state}", seconds(train, log, env, done)
            words = "--config.sample.prompt=a red four"
            sample = [*MAIN, "sample", *common, words]
            before = set(workdir.rglob("*.png"))
            done = lambda dir=workdir, old=before: set(dir.rglob("*.png")) - old
            yield f"first picture, {state}", seconds(sample, log, env, done)


def seconds(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    done=None,
) -> float:
    """Seconds until the command exits, or until done(), after which it is killed."""
    with log.open("a") as out:
        start, at = time.perf_counter(), None
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=environment(env),
            preexec_fn=end_with_parent,
        )
        try:
            # Polled: a job's first step shows in its files, and the process goes on.
            while process.poll() is None:
                if done is not None and at is None and done():
                    at = time.perf_counter() - start
                if time.perf_counter() - start > LONG:
                    raise Failed(f"{' '.join(command)}: more than {LONG:g} s")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        name = " ".join([os.path.basename(command[0]), *command[1:]])
        raise Failed(f"{name}: exit code {process.returncode}; see {log}")
    if at is None and done is not None and not done():
        raise Failed(f"{' '.join(command)}: ended before the expected line")
    return time.perf_counter() - start if at is None else at
