"""Errors, and the exit codes with which they end a process (EXIT_CODES).

All processes of a run exit with the code of the first one that ended.
"""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator

FAILED, MISTAKE, RETRY, INTERRUPTED = 1, 2, 3, 130
EXIT_CODES = {  # docs/reference/exit_codes.md: what supervisors do
    0: "done, or stopped by SIGTERM or train.max_hours with a checkpoint saved",
    FAILED: "restarting cannot help: NaN loss, a failed check, or a bug (traceback)",
    MISTAKE: "your mistake, or a full or read-only disk: one line says what to change",
    RETRY: "start it again: stuck, a peer gone, a device, network or storage fault",
    INTERRUPTED: "Ctrl-C",
}
# Faults of a file system that the user must repair, and those that pass.
DISK = "ENOSPC EDQUOT EROFS EACCES EPERM ENOTDIR EISDIR".split()
PASSING = (
    "EIO ESTALE ETIMEDOUT EREMOTEIO ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH"
    " ENOTCONN"
).split()
# absl's status codes that begin a JaxRuntimeError. RESOURCE_EXHAUSTED, INVALID_ARGUMENT
# and UNIMPLEMENTED are absent: the same program on the same devices meets them again.
RUNTIME = (
    "ABORTED CANCELLED DATA_LOSS DEADLINE_EXCEEDED FAILED_PRECONDITION INTERNAL"
    " UNAVAILABLE UNKNOWN"
).split()
COMPILING = ("Mosaic failed to compile", "during compilation")  # it would fail again
# The codes that may pass in what tensorstore raises as a ValueError.
STORAGE = ("ABORTED", "DEADLINE_EXCEEDED", "UNAVAILABLE")
# Errors of other packages, by name, so that none of them is imported here. Base classes
# count as well.
NETWORK = {
    *("socket.gaierror", "ssl.SSLError", "urllib.URLError", "http.HTTPException"),
    *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
    *(
        "httpx.TransportError",
        "httpx2.TransportError",
        "urllib3.HTTPError",
        "google.TransportError",
    ),
    *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
    *("aiohttp.ServerTimeoutError",),
}


class UserError(Exception):
    """A fault that the user must correct: main prints one line and exits with 2."""


class ConfigError(UserError, ValueError):
    """An invalid recipe, config key or value."""


class RunFailed(Exception):
    """A run that cannot continue, through no user mistake: one line, exit code 1."""


class RetryableError(Exception):
    """A fault outside the run that may pass: one line, exit code 3, restart."""


@contextlib.contextmanager
def explained(action: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raise any failure of orbax inside as one line that begins with `action`.

    Storage that does not answer is not damage and no mistake: RetryableError.
    """
    try:
        yield
    except (UserError, RunFailed, RetryableError):
        raise
    except Exception as e:
        # Orbax wraps each failure, and its wrapper speaks of handlers that do not fit;
        # what failed is the cause.
        truth = e.__cause__ or e
        reason = " ".join(str(truth).split())[:300]
        kind = RetryableError if passing(truth) else kind
        raise kind(f"{action}: {type(truth).__name__}: {reason}") from e


@contextlib.contextmanager
def prefixed(where: str) -> Iterator[None]:
    """Begin the message of a UserError with `where`, such as "config.eval.real"."""
    try:
        yield
    except UserError as error:
        # A UserError and not its subclass: those mean a kind of record or of config.
        raise UserError(f"{where}: {error}") from None


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with this error."""
    if isinstance(error, RetryableError):
        return RETRY
    if isinstance(error, UserError) or _has_errno(error, DISK):
        return MISTAKE
    if _kinds(error) & {"gcsfs.HttpError"} and _http_status(error) in (401, 403):
        return MISTAKE
    return RETRY if passing(error) else FAILED


def passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: device, network and storage faults."""
    if isinstance(error, BrokenPipeError):  # whoever read our output is gone
        return False
    if isinstance(error, ConnectionError | TimeoutError) or _has_errno(error, PASSING):
        return True
    kinds = _kinds(error)
    if "gcsfs.HttpError" in kinds:
        code = _http_status(error)
        return code in (408, 429) or code >= 500
    if kinds & NETWORK:
        return True
    status = re.match("[A-Z_]+(?=:)", str(error))
    if any(kind.endswith((".JaxRuntimeError", ".XlaRuntimeError")) for kind in kinds):
        if any(words in str(error) for words in COMPILING):
            return False
        # Without a status it is a collective's own text: gloo's "Connection closed".
        return status is None or status[0] in RUNTIME
    return status is not None and status[0] in STORAGE


def os_code(error: BaseException) -> int | None:
    """The errno of an OSError, or the one that tensorstore's text ends in."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


def _kinds(error: BaseException) -> set[str]:
    """ "package.Name" of an error's class and all base classes."""
    # Names, since importing jax or gcsfs takes seconds.
    return {f"{c.__module__.partition('.')[0]}.{c.__name__}" for c in type(error).mro()}


def _http_status(error: BaseException) -> int:
    code = str(getattr(error, "code", ""))
    return int(code) if code.isdecimal() else 0


def _has_errno(error: BaseException, names: Iterable[str]) -> bool:
    code = os_code(error)
    return code is not None and code in {getattr(errno, x, None) for x in names}


def near(name: str, choices: Iterable[str]) -> str | None:
    """The choice that was probably meant, or None; case does not matter."""
    spelling = {choice.lower(): choice for choice in choices}
    match = difflib.get_close_matches(name.lower(), spelling, n=1)
    return spelling[match[0]] if match else None


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of a message: `; did you mean "euler"?`, or else all the choices."""
    choices = list(choices)
    match = near(name, choices)
    if match is not None:
        return f'; did you mean "{match}"?'
    return f"; expected one of {', '.join(choices)}" if choices else ""
