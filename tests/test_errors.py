"""Exit codes: what a restart repairs, what the user must, and what nobody can."""

import errno
import http.client
import socket
import ssl
import urllib.error

import jax
import pytest

from sd3_jax.errors import ConfigError, RetryableError, RunFailed, UserError, exit_code


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        self.code = code


HttpError.__module__ = "gcsfs.retry"


def of(module, *names):
    """The last of error classes that derive from one another, of a package's."""
    kind = Exception
    for name in names:
        kind = type(name, (kind,), {"__module__": module})
    return kind


fault = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such weights"), 2),
        (ConfigError("no such key"), 2),
        (OSError(errno.ENOSPC, "no space"), 2),
        (PermissionError(errno.EACCES, "denied"), 2),
        (RunFailed("NaN"), 1),
        (ValueError("a bug"), 1),
        (FileNotFoundError(errno.ENOENT, "absent"), 1),
        (RetryableError("waited 600 s for process 1"), 3),
        (ConnectionResetError("by peer"), 3),
        (TimeoutError("storage"), 3),
        (OSError(errno.ESTALE, "stale handle"), 3),
        (fault("UNAVAILABLE: Connection reset by peer"), 3),
        (fault("DEADLINE_EXCEEDED: Barrier timed out"), 3),
        (fault("INTERNAL: chip is gone"), 3),
        (fault("Gloo all-reduce failed"), 3),
        (fault("RESOURCE_EXHAUSTED: out of memory"), 1),
        (fault("INVALID_ARGUMENT: shapes"), 1),
        (ValueError("UNAVAILABLE: tensorstore"), 3),
        (HttpError(503), 3),
        (HttpError(403), 2),
        (HttpError(404), 1),
        (BrokenPipeError("| head"), 1),
        (fault("INTERNAL: Mosaic failed to compile TPU kernel"), 1),
        (socket.gaierror(socket.EAI_AGAIN, "name resolution"), 3),
        (ssl.SSLEOFError("EOF occurred"), 3),
        (urllib.error.URLError("timed out"), 3),
        (http.client.IncompleteRead(b"half"), 3),
        (of("requests.exceptions", "ConnectionError", "ProxyError")("reset"), 3),
        (of("requests.exceptions", "Timeout", "ReadTimeout")("read"), 3),
        (of("httpx", "TransportError", "ReadError")("cut"), 3),
        (of("elsewhere", "TransportError")("ours"), 1),
    ],
    ids=str,
)
def test_every_error_has_its_code(error, code):
    assert exit_code(error) == code
