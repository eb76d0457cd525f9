"""Runs the voting page until Ctrl-C or SIGTERM."""

import signal
import socket
import threading

from starlette.applications import Starlette

from sd3_jax.serving.http_server import HttpServer

LOOPBACK = ("127.0.0.1", "localhost")
GRACE = 5  # seconds for running requests when the server stops
READ = 60.0  # seconds in which a client must send or read something


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Names by which browsers may ask for this server."""
    # DNS rebinding: another site's name may resolve to 127.0.0.1, and its scripts would
    # then be of this origin. A public address has names that this host does not know.
    return LOOPBACK if host in LOOPBACK else ("*",)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until SIGTERM, which returns, or Ctrl-C, which is raised."""
    server, stopped = HttpServer(app, listener, read_s=READ), threading.Event()
    # Python's handlers run in the main thread, between two waits.
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    server.start()
    try:
        # A wait without a limit would not see Ctrl-C.
        while server.alive and not stopped.wait(0.2):
            pass
    finally:
        server.stop(GRACE)
        signal.signal(signal.SIGTERM, before)
