"""Several Python processes that form one JAX cluster over loopback, for tests.

    results = multiprocess.run(["tests/checkpoints/checkpoint_worker.py", "save", path])
    results = multiprocess.run(["-m", "sd3_jax.main", "train", ...], processes=2)

Each finds SD3_COORDINATOR, SD3_NUM_PROCESSES, SD3_PROCESS_ID and bounds on waiting
(SD3_INIT_S, SD3_HEARTBEAT_S, SD3_SHUTDOWN_S, in seconds) in its environment.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A stuck collective ends in an error instead of a silent hang.
XLA_FLAGS = (
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=20",
    "--xla_cpu_collective_call_terminate_timeout_seconds=60",
    "--xla_cpu_collective_timeout_seconds=60",
    "--xla_backend_optimization_level=0",  # as in conftest.py
    "--xla_cpu_use_fusion_emitters=false",
)


def run(
    args: str | Path | Sequence[str | Path],
    *,
    processes: int = 2,
    devices: int = 4,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> list[subprocess.CompletedProcess]:
    """Run `python *args` in every process to its end; TimeoutError shows the output."""
    deadline = time.monotonic() + timeout
    with start(args, processes=processes, devices=devices, env=env) as cluster:
        late = False
        for process in cluster:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
        kill(cluster)
        results = [result(process) for process in cluster]
    if late:
        tails = "\n".join(f"-- {i}\n{r.stderr[-2000:]}" for i, r in enumerate(results))
        raise TimeoutError(f"{args} ran longer than {timeout} s\n{tails}")
    return results


@contextlib.contextmanager
def start(
    args: str | Path | Sequence[str | Path],
    *,
    processes: int = 2,
    devices: int = 4,
    env: Mapping[str, str] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """The running processes, to be signalled; none outlives the block."""
    args = [args] if isinstance(args, str | Path) else list(args)
    shared = environment(processes, devices) | dict(env or {})
    cluster = []
    with contextlib.ExitStack() as stack:
        stack.callback(kill, cluster)
        for i in range(processes):
            # Files, not pipes: a full pipe would block its writer.
            files = [tempfile.TemporaryFile("w+") for _ in range(2)]
            out, err = map(stack.enter_context, files)
            process = subprocess.Popen(
                [sys.executable, *map(str, args)],
                cwd=ROOT,
                env=shared | {"SD3_PROCESS_ID": str(i)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # its children share its fate, see kill
            )
            process.output = out, err
            cluster.append(process)
        yield cluster


def kill(cluster: Sequence[subprocess.Popen]) -> None:
    """SIGKILL what is left of each process's group, and reap it."""
    for process in cluster:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def result(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """The return code and output of a process that has ended."""
    texts = []
    for file in process.output:
        file.seek(0)
        texts.append(file.read())
    return subprocess.CompletedProcess(process.args, process.returncode, *texts)


def environment(processes: int, devices: int) -> dict[str, str]:
    """What all processes of a cluster have in common."""
    cache = str(ROOT / "tests" / ".cache" / "jax")  # as in conftest.py
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    count = f"--xla_force_host_platform_device_count={devices}"
    defaults = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return {
        **defaults,
        **os.environ,
        "NPROC": "64",  # conftest.py says why
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([count, *XLA_FLAGS]),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "SD3_COORDINATOR": f"127.0.0.1:{_free_port()}",
        "SD3_NUM_PROCESSES": str(processes),
        "SD3_HEARTBEAT_S": "10",
        "SD3_SHUTDOWN_S": "10",
        "SD3_INIT_S": "60",
    }


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
