"""The layer around all routes: API keys, request ids, and what is counted."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd3_jax.serving.api_errors import ApiError
from sd3_jax.serving.service_metrics import ServiceMetrics

# Pictures by URL lie outside /v1: an <img> tag sends no Authorization header. Their
# names are random instead (picture_store.py).
PROTECTED = "/v1/"
# A fixed set of labels: a counter for each path that clients make up would grow without
# bound.
COUNTED = ("/v1/images/generations", "/v1/images/edits", "/v1/models", "/pictures/")


class Access:
    """ASGI middleware; `keys` are the bearer tokens that open /v1, () for none."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Sequence[str],
        metrics: ServiceMetrics,
        *,
        most: int = 1000,
    ):
        self._app, self._metrics, self._most, self._open = app, metrics, most, 0
        # Digests have one length, which compare_digest needs to hide that of a key.
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A "lifespan" scope has neither a path nor headers.
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint = next((x for x in COUNTED if scope["path"].startswith(x)), "other")
        # The server's own: two clients may send the same one.
        name = f"req_{secrets.token_hex(12)}"

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                # OpenAI's clients show this header as request_id.
                MutableHeaders(scope=message)["X-Request-Id"] = name
                status = str(message["status"])
                self._metrics.requests.labels(endpoint, status).inc()
                if message["status"] in (400, 401, 408, 413, 429, 503):
                    self._metrics.rejected.labels(status).inc()
            await send(message)

        # Judged before this request is counted as open, so that `most` are let in.
        refusal = self._refusal(scope, endpoint)
        self._open += 1
        try:
            with self._metrics.open_requests.track_inprogress():
                await (refusal or self._app)(scope, receive, answer)
        finally:
            self._open -= 1

    def _refusal(self, scope: Scope, endpoint: str) -> JSONResponse | None:
        # Health and metrics are answered in any case.
        if endpoint != "other" and self._open >= self._most:
            error = ApiError(503, "too many requests at once", code="busy", wait=1)
            return JSONResponse(error.body(), 503, error.headers)
        if scope["path"].startswith(PROTECTED) and not self._admits(scope):
            error = ApiError(401, "missing or unknown API key", code="invalid_api_key")
            return JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
        return None

    def _admits(self, scope: Scope) -> bool:
        # A browser sends its CORS preflight without the key.
        if not self._digests or scope["method"] == "OPTIONS":
            return True
        header = Headers(scope=scope).get("authorization", "")
        kind, _, key = header.partition(" ")
        digest = _digest(key.strip())
        # All are compared, in constant time: the time of an answer tells nothing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return kind.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()
