"""This process's resident memory: now, at its peak, and resetting the peak."""

import ctypes
import os
import re
import resource
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def now() -> int:
    """Resident bytes."""
    return _status("VmRSS")


def peak() -> int:
    """The most resident bytes since the start, or since `reset`."""
    if STATUS.is_file():
        return _status("VmHWM")
    # getrusage counts in bytes on macOS and in KiB on Linux.
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset() -> bool:
    """Resets `peak` to the present memory, after returning freed memory to the system;
    False if the system does not allow it."""
    try:
        # glibc keeps freed memory; without this the peak would begin at the peak
        # before.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # it is glibc's
        pass
    try:
        # Writing 5 to clear_refs resets VmHWM, the kernel's high-water mark (proc(5)).
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int:
    # Without /proc the peak stands in for the present size.
    if not STATUS.is_file():
        return peak()
    match = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(match[1]) * 1024
