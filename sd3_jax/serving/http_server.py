"""uvicorn in a thread of its own, with a bound on slow requests."""

import errno
import socket
import threading

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from sd3_jax.errors import UserError

BACKLOG = 2048  # connections that the kernel holds until they are accepted
HEAD = 2**16  # bytes of a request's line and headers


class HttpServer:
    """Serves `app` on a bound socket from start() to stop().

    `proxies` are the addresses whose X-Forwarded headers are believed.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        *,
        read_s: float,
        proxies: str = "127.0.0.1",
    ):
        self._socket = listener
        self.address = listener.getsockname()[:2]
        # h11 and not httptools, because the protocol below overrides its methods.
        # lifespan="off": the job starts and stops what the app uses. log_config=None
        # leaves the logging of the process as main set it up.
        config = uvicorn.Config(
            app,
            http=_bounded(read_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=BACKLOG,
            h11_max_incomplete_event_size=HEAD,
            proxy_headers=True,
            forwarded_allow_ips=proxies,
        )
        self._server = uvicorn.Server(config)
        # Outside of the main thread, uvicorn leaves signals alone.
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), daemon=True, name="http"
        )

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, seconds: float) -> None:
        """Ends once answers that are being sent are sent, or after so many seconds."""
        # uvicorn polls both flags: first it finishes open responses, then it drops
        # them.
        self._server.should_exit = True
        self._thread.join(seconds)
        self._server.force_exit = True
        self._thread.join(5)
        self._socket.close()


def bound_socket(host: str, port: int, group: str) -> socket.socket:
    """A socket at the address of config.GROUP; UserError if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A restarted server may bind while connections of the old one are in TIME_WAIT.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        # From here on clients wait instead of being refused.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        advice = ""
        if error.errno == errno.EADDRINUSE:
            advice = "; stop the program that uses it, or set another port, or 0"
        raise UserError(
            f"config.{group}.host = {host}, config.{group}.port = {port}:"
            f" {error.strerror or error}{advice}"
        ) from None
    listener.set_inheritable(True)
    return listener


def _bounded(seconds: float) -> type[H11Protocol]:
    """A protocol that closes connections of clients that send or read nothing.

    uvicorn bounds the pause between two requests alone; the app bounds the body.
    """

    # A client that sends its head byte by byte ("slowloris") would hold a connection
    # for as long as it likes; the bytes of a head do not restart the timer.
    class BoundedProtocol(H11Protocol):
        _head = None
        _unread = 0

        def on_response_complete(self):
            super().on_response_complete()
            self.loop.call_later(seconds, self._require_reader)

        def _require_reader(self):
            # uvicorn closes idle connections once all is sent, which a client that
            # reads nothing would never let happen.
            unread = self.transport.get_write_buffer_size()
            # Two looks `seconds` apart saw the same bytes: nothing was read in between.
            if unread and unread == self._unread:
                self.transport.abort()
            elif unread:
                self.loop.call_later(seconds, self._require_reader)
            self._unread = unread

        def connection_made(self, transport):
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data):
            super().data_received(data)
            self._expect_head()

        def connection_lost(self, exc):
            self._forget()
            super().connection_lost(exc)

        def _expect_head(self):
            cycle = self.cycle
            # A cycle begins when the head is complete.
            if cycle is not None and not cycle.response_complete:
                self._forget()
            elif self._head is None:
                self._head = self.loop.call_later(seconds, self._close)

        def _forget(self):
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _close(self):
            self._head = None
            cycle = self.cycle
            busy = cycle is not None and not cycle.response_complete
            if not busy and not self.transport.is_closing():
                self.transport.close()

    return BoundedProtocol
