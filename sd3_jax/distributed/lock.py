"""One job at a time in a workdir: a lock file that says who holds it.

The operating system's own lock goes with its process, however that ends. Where it
does not reach, on an object store or another host's disk, the holder writes a beat to
the file; one without beats has ended. No two clocks are compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from etils import epath

from sd3_jax import files
from sd3_jax.distributed import processes
from sd3_jax.errors import UserError

BEAT = 10.0  # seconds


@contextlib.contextmanager
def held(workdir: epath.PathLike, job: str, *, beat: float = BEAT) -> Iterator[None]:
    """While the block runs no other `job` runs in workdir: UserError if one does.

    Process 0 holds it for all processes.
    """
    # One file a job: only the same job is kept out.
    lock = Lock(epath.Path(workdir) / f".{job}.lock", beat)
    processes.first(lock.take)
    try:
        yield
    finally:
        lock.release()


class Lock:
    """A file's lock: take() raises UserError if another has it, release() frees it."""

    def __init__(self, path: epath.Path, beat: float = BEAT):
        self.path, self.beat = path, beat
        self._file, self._over, self._beats = None, threading.Event(), 0
        self._holder, self._taken = _identity(), False

    def take(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except (OSError, ImportError) as error:  # gs:// needs its own package
            if getattr(error, "errno", None) == errno.ELOOP:
                raise UserError(f"{self.path} is a link; remove it") from None
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot write to {self.path.parent}: {reason}") from None

    def _take(self) -> None:
        if not files.remote(self.path):
            self._file = _open(self.path)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise self._refusal() from None
        # flock does not reach other hosts, and an object store has none. There a holder
        # that lives changes the file within a beat.
        holder = self._read()
        elsewhere = holder.get("host") not in (None, socket.gethostname())
        if elsewhere or (holder and self._file is None and _lives(holder)):
            time.sleep(2.5 * self.beat)
            if self._read() != holder:
                raise self._refusal()
        self._taken = True
        self._write()
        threading.Thread(target=self._keep, daemon=True, name="lock").start()

    def release(self) -> None:
        self._over.set()
        if not self._taken:
            return
        with contextlib.suppress(OSError):  # the folder may be gone by now
            if self._file is None:
                self.path.unlink(missing_ok=True)
            else:
                # Emptied, not removed: another process may have opened this very file,
                # and would hold a lock that nobody else sees.
                os.ftruncate(self._file.fileno(), 0)
                self._file.close()

    def _keep(self) -> None:
        while not self._over.wait(self.beat):
            # A beat that fails costs nothing: the next one comes in a few seconds.
            with contextlib.suppress(OSError, ValueError):
                self._write()

    def _write(self) -> None:
        self._beats += 1
        text = json.dumps(self._holder | {"beats": self._beats}).encode()
        if self._file is None:
            self.path.write_bytes(text)
        else:
            # Padded: a longer text from before leaves no tail.
            os.pwrite(self._file.fileno(), text.ljust(256) + b"\n", 0)

    def _read(self) -> dict:
        try:
            holder = json.loads(self.path.read_bytes() or b"{}")
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _refusal(self) -> UserError:
        holder = self._read()
        who = ", ".join(
            f"{k} {holder[k]}" for k in ("host", "pid", "since") if k in holder
        )
        return UserError(
            f"another job is running in {self.path.parent} ({who or self.path.name}):"
            " wait for it, stop it, or use another workdir"
        )


def _open(path: epath.Path) -> BinaryIO:
    """The lock's file itself; a link is refused, for its target would be truncated."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.fdopen(os.open(path, flags, 0o644), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise UserError(f"{path} is not a regular file; remove it, nothing needs it")
    return file


def _identity() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "start": _start(os.getpid()),
    }


def _start(pid: int) -> str | None:
    """Boot id and start time of a process in ticks; None if there is none.

    A number alone does not name a process: in a container the next one often has the
    number of the one before it.
    """
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return f"{boot}:{ticks}"


def _lives(holder: dict) -> bool:
    return holder.get("start") is None or _start(holder["pid"]) == holder["start"]
