"""Runs the voting page until Ctrl-C or SIGTERM."""

import logging
import signal
import socket
import threading

import uvicorn
from starlette.applications import Starlette

from sd3_jax.errors import UserError

log = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost")
GRACE = 5  # seconds for running requests when the server stops


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"config.vote.host = {host}, config.vote.port = {port}: {reason}; set"
            " another port, or 0 for any that is free"
        ) from None


def allowed_hosts(host: str) -> tuple[str, ...]:
    """Names by which browsers may ask for this server."""
    # DNS rebinding: another site's name may resolve to 127.0.0.1, and its scripts would
    # then be of this origin. A public address has names that this host does not know.
    return LOOPBACK if host in LOOPBACK else ("*",)


def serve(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until SIGTERM, which returns, or Ctrl-C, which is raised."""
    settings = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(settings)

    def stop(*_) -> None:
        server.should_exit = True

    # In its own thread uvicorn leaves signals alone: they stay main's.
    arguments = {"sockets": [listener]}
    thread = threading.Thread(target=server.run, kwargs=arguments, name="uvicorn")
    # Python's handlers run in the main thread, between two joins.
    before = signal.signal(signal.SIGTERM, stop)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.2)  # a join without a limit would not see Ctrl-C
    finally:
        stop()
        thread.join()
        signal.signal(signal.SIGTERM, before)
        listener.close()
