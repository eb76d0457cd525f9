"""The command line: flags -> jax.distributed -> jobs.NAME.run(config, workdir)."""

import contextlib
import errno
import hashlib
import importlib
import importlib.metadata
import logging
import os
import platform
import select
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sd3_jax.config.command_line import Call, parse, usage
from sd3_jax.config.validation import leaves
from sd3_jax.distributed import signals
from sd3_jax.errors import (
    FAILED,
    INTERRUPTED,
    MISTAKE,
    RETRY,
    RetryableError,
    RunFailed,
    UserError,
    exit_code,
)

PACKAGES = "jax jaxlib flax optax orbax-checkpoint grain numpy".split()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes are in errors.py: 0 done, 1 failed, 2 the user's mistake, 3 retry."""
    os.environ["SD3_BEGAN"] = str(time.time())  # train's start-up has imports in it
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(usage(), file=sys.stderr)
        return MISTAKE
    with signals.answered():
        return answer(argv)


def answer(argv: Sequence[str]) -> int:
    """Run the job and turn whatever it raises into one line and an exit code."""
    try:
        set_up_logging()
        call = parse(argv)
        # Environment variables first: jax and fsspec read them when they are imported.
        keep_programs(call.workdir)
        list_buckets_anew()
        join_processes()
        code = run(call)
        flush()
        return code
    except KeyboardInterrupt as stop:
        reason, code = f"interrupted: {stop}".removesuffix(": "), INTERRUPTED
        say(reason)
    except Exception as error:
        code = exit_code(error)
        if isinstance(error, BrokenPipeError) and output_is_closed():
            reason = (
                "the reader of its output closed the pipe"  # and needs no more words
            )
        elif code == MISTAKE or isinstance(error, RunFailed | RetryableError):
            reason = " ".join(str(error).split())
            # jax notes, below a line of dashes, that it shortened the traceback.
            notes = [x for x in getattr(error, "__notes__", ()) if x[:2] != "--"]
            for line in (reason, *notes):
                say("error:", *line.split())
        elif code == FAILED and not joined():
            raise  # a bug of ours: its traceback is what is needed
        else:
            reason = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        if joined() and code != MISTAKE and not isinstance(error, RunFailed):
            from sd3_jax.distributed import watchdog

            # A peer's end fails the collectives that it was in, and its code is the
            # true one: a mistake on one host must not end the others with "retry".
            watchdog.follow(seconds=2 * watchdog.EVERY if code == RETRY else 0)
    if joined():
        from sd3_jax.distributed import watchdog

        # Not by a return: at exit jax waits for the peers, and they for this process.
        watchdog.leave(reason, code)
    return code


def say(*words: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print("sd3-jax:", *words, file=sys.stderr, flush=True)


def flush() -> None:
    """Flush stdout now, where a failure is an error; at exit it is a traceback."""
    if sys.stdout is not None:
        sys.stdout.flush()


def output_is_closed() -> bool:
    """Whether stdout's reader has closed the pipe (`| head`); drops what is left.

    stdout becomes /dev/null then, or Python's flush at exit would fail once more.
    """
    poll = select.poll()
    poll.register(sys.stdout, 0)
    if closed := bool(poll.poll(0)):  # POLLERR of a pipe, POLLHUP of a terminal
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def run(call: Call) -> int:
    """Run the job, once all processes have stated the same job, config and code."""
    from sd3_jax.distributed import (  # no earlier, for they import jax
        processes,
        watchdog,
    )

    with watchdog.watching():
        if joined():
            processes.agree("code or config", statement(call))
        job = importlib.import_module(f"sd3_jax.jobs.{call.job}")
        try:
            return job.run(call.config, call.workdir) or 0
        except KeyboardInterrupt as stop:  # train says more
            now = f"during {watchdog.doing()}; " if watchdog.doing() else ""
            again = f"{now}run the same command to continue"
            raise KeyboardInterrupt(str(stop) or again) from None


def statement(call: Call) -> dict:
    """What must be the same in every process: job, config, versions, code."""
    values = {f"config.{key}": value for key, value in leaves(call.config)}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    about = {"job": call.job, "workdir": call.workdir, "sd3_jax": code.hexdigest()[:12]}
    return about | versions | values


def set_up_logging() -> None:
    """INFO from us and from the root logger, warnings from everyone else, to stderr."""
    handler = logging.StreamHandler()
    ours = ("root", "sd3_jax")
    handler.addFilter(
        lambda record: (
            record.levelno >= logging.WARNING or record.name.split(".")[0] in ours
        )
    )
    form = "%(asctime)s %(levelname).1s %(message)s"
    logging.basicConfig(
        level=logging.INFO, format=form, datefmt="%H:%M:%S", handlers=[handler]
    )


def keep_programs(workdir: str = "") -> None:
    """Keep compiled programs, unless JAX_COMPILATION_CACHE_DIR is set (or empty).

    A run on a bucket keeps them beside its checkpoints, since its machines come and go;
    any other run keeps them in the user's cache folder. jax reaches a bucket through
    etils.epath and gcsfs, and all processes read what the first one writes.
    """
    flags = Path("/proc/cpuinfo")
    lines = flags.read_text().splitlines() if flags.is_file() else []
    processor = [x for x in lines if x.startswith(("model name", "flags"))][:2]
    host = " ".join([platform.machine(), *processor])
    kind = f"{zlib.crc32(host.encode()):08x}"
    # One folder per kind of host: XLA compiles for the exact processor.
    folder = str(cache_home() / "sd3_jax" / kind)
    if "://" in workdir:
        folder = f"{workdir.rstrip('/')}/compilation_cache/{kind}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    # jax's default is a second.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


def list_buckets_anew() -> None:
    """Have fsspec, behind etils.epath, look at a bucket whenever it is asked.

    It keeps listings, but orbax writes there by another client, and so do other hosts:
    by an old listing a saved step is missing.
    """
    for name in "FSSPEC_GCS", "FSSPEC_S3":
        os.environ.setdefault(name, '{"use_listings_cache": false}')


def cache_home() -> Path:
    """XDG_CACHE_HOME, ~/.cache, or where there is no home a folder below TMPDIR."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except (RuntimeError, KeyError):  # no HOME, and no passwd entry: in a container
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        return Path(tempfile.mkdtemp())  # cached programs are run: only our own
    return folder


def join_processes() -> None:
    """jax.distributed.initialize, if SD3_* or jax's own detection says there are peers.

    SD3_COORDINATOR (host:port), SD3_NUM_PROCESSES and SD3_PROCESS_ID describe a run by
    hand; SD3_INIT_S, SD3_HEARTBEAT_S and SD3_SHUTDOWN_S bound its waits in seconds.
    """
    peers, seconds = described_peers(), whole("SD3_INIT_S", 300, low=1)
    waits = dict(
        initialization_timeout=seconds + 60,  # jax aborts then; `bounded` says why
        heartbeat_timeout_seconds=whole("SD3_HEARTBEAT_S", 30, low=1),
        shutdown_timeout_seconds=whole("SD3_SHUTDOWN_S", 30, low=1),
    )
    import jax  # no earlier: help and mistakes are not to wait for it

    from sd3_jax.distributed.jax_internals import detected_processes

    if peers:
        refuse_port_in_use(peers)
        where = "process {process_id} of {num_processes}, at {coordinator_address}"
        with bounded(seconds, where.format(**peers)):
            jax.distributed.initialize(
                **peers, **waits, cluster_detection_method="deactivate"
            )
    # `initialize` alone will not do: in a Slurm step of one task it hides all GPUs but
    # one.
    elif (count := detected_processes()) > 1:
        with bounded(seconds, f"one of {count} processes"):
            jax.distributed.initialize(**waits)


@contextlib.contextmanager
def bounded(seconds: int, who: str) -> Iterator[None]:
    """Exit with the code for a retry, in one line, if the peers have not come by then.

    A peer whose machine is still being created comes at the next attempt.
    """

    def give_up():
        print(
            f"sd3-jax: error: SD3_INIT_S = {seconds}: not all processes connected"
            f" within {seconds} s; this is {who}: start all of them with the same"
            " address",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RETRY)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def refuse_port_in_use(peers: dict) -> None:
    """jax would print a stack; its processes then wait for an address of another's."""
    address = peers["coordinator_address"]
    port = int(address.rpartition(":")[2])
    if peers["process_id"] != 0:
        return
    for family, host in (socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0"):
        try:
            with socket.socket(family) as probe:  # as gRPC binds: all of the host's
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            return
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"SD3_COORDINATOR = {address}: port {port}: {error.strerror}, on"
                    " the host of process 0; use a free port over 1023, the same in"
                    " every process, or stop the program that uses it"
                ) from None


def joined() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def described_peers() -> dict:
    names = ("SD3_COORDINATOR", "SD3_NUM_PROCESSES", "SD3_PROCESS_ID")
    absent = [name for name in names if not os.environ.get(name)]
    if len(absent) == len(names):
        return {}
    if absent:
        raise UserError(
            f"{absent[0]} is not set; set all of {', '.join(names)}, or none"
        )
    address = os.environ["SD3_COORDINATOR"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"SD3_COORDINATOR = {address}: expected host:port")
    count = whole("SD3_NUM_PROCESSES", low=1)
    index = whole("SD3_PROCESS_ID", low=0, high=count - 1)
    return dict(coordinator_address=address, num_processes=count, process_id=index)


def whole(name, default=None, *, low, high=2**31 - 1):
    """An environment variable that holds an integer."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name} = {text}: expected an integer in [{low}, {high}]")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
