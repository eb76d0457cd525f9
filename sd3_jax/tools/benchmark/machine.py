"""The machine, packages and command of a benchmark."""

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import sys
from pathlib import Path

from sd3_jax.tools.benchmark import cases, process_memory

PACKAGES = "jax jaxlib flax optax numpy torch diffusers transformers".split()


def present(module: str) -> bool:
    # find_spec does not import: PyTorch takes seconds, and memory in this process.
    return importlib.util.find_spec(module) is not None


def missing(kind: str) -> str:
    """Why PyTorch's side cannot run a kind, or ""."""
    absent = [x for x in cases.NEEDS.get(kind, cases.DIFFUSERS) if not present(x)]
    return f"{absent[0]} is not installed" if absent else ""


def about(*, dtype: str, repeats: int) -> dict:
    return {
        "command": command(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": processor(),
        # The cores that this process may use, which in a container are fewer than the
        # machine's.
        "cores": len(os.sched_getaffinity(0)),
        # Taken before the benchmark starts: its own processes would show in it later.
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("sd3-jax", *PACKAGES)},
        "dtype": dtype,
        "repeats": repeats,
        "memory_reset": process_memory.CLEAR.exists(),
    }


def command() -> str:
    first, *rest = sys.argv
    ours = os.path.basename(first) in ("main.py", "sd3-jax")
    return shlex.join(["sd3-jax", *rest] if ours else [os.path.basename(first), *rest])


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    # platform.processor() is empty or only an architecture on most Linux systems.
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    match = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()
