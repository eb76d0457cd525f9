"""The routes: OpenAI's Images API, models, health, metrics and the schema."""

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from sd3_jax.foreign_text import shown
from sd3_jax.serving import openapi, request_bodies, request_fields, service_metrics
from sd3_jax.serving.access import Access
from sd3_jax.serving.api_errors import ApiError, invalid
from sd3_jax.serving.service import Service, stopping

log = logging.getLogger(__name__)
ABOUT = """sd3_jax serves {model}.

POST /v1/images/generations   pictures of a prompt (OpenAI's Images API)
POST /v1/images/edits         a picture, changed: multipart with image and mask
GET  /v1/models               the served model
GET  /openapi.json            the schema, with all fields
GET  /healthz /readyz         whether it lives, whether it takes requests
GET  /metrics                 for Prometheus
"""


def build(
    service: Service,
    *,
    keys: Sequence[str] = (),
    origins: Sequence[str] = (),
    most: int = 1000,
) -> Starlette:
    """The ASGI application; with `keys`, /v1 needs one of them as a bearer token."""
    routes = Routes(service)
    middleware = [Middleware(Access, keys=keys, metrics=service.metrics, most=most)]
    if origins:
        cors = dict(allow_origins=list(origins), allow_methods=["*"])
        # Outermost, since a refusal of Access also needs CORS headers: without them a
        # browser hides the status from its page.
        middleware.insert(0, Middleware(CORSMiddleware, allow_headers=["*"], **cors))
    return Starlette(
        routes=[
            Route("/", routes.index),
            Route("/v1/images/generations", routes.generations, methods=["POST"]),
            Route("/v1/images/edits", routes.edits, methods=["POST"]),
            Route("/v1/models", routes.models),
            # ":path" because names such as "org/model" contain slashes.
            Route("/v1/models/{name:path}", routes.model),
            Route("/pictures/{name}", routes.picture),
            Route("/healthz", routes.healthz),
            Route("/readyz", routes.readyz),
            Route("/metrics", routes.metrics),
            Route("/openapi.json", routes.schema),
        ],
        middleware=middleware,
        exception_handlers={
            ApiError: answer_error,
            HTTPException: answer_http,
            Exception: answer_bug,
        },
    )


class Routes:
    """One method for each path."""

    def __init__(self, service: Service):
        self._service = service
        self._bodies = request_bodies.Bodies(service.limits)

    async def index(self, request: Request) -> Response:
        return PlainTextResponse(ABOUT.format(model=self._service.model))

    async def healthz(self, request: Request) -> Response:
        # Alive until a fault: a server that drains still works.
        engine = self._service.engine
        well = engine.fault is None
        return JSONResponse({"alive": well}, 200 if well else 503)

    async def readyz(self, request: Request) -> Response:
        ready = self._service.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        text = self._service.metrics.text()
        return Response(text, headers={"Content-Type": service_metrics.TYPE})

    async def schema(self, request: Request) -> Response:
        return JSONResponse(openapi.schema(self._service.limits, self._service.model))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._service.model:
            raise ApiError(
                404, f'model "{shown(name)}" does not exist', code="model_not_found"
            )
        return JSONResponse(self._model())

    def _model(self) -> dict:
        about = {"id": self._service.model, "object": "model", "owned_by": "sd3_jax"}
        return about | {"created": self._service.created}

    async def picture(self, request: Request) -> Response:
        stored = self._service.store.get(request.path_params["name"])
        if stored is None:
            raise ApiError(
                404, "no such picture; only the newest are kept", code="not_found"
            )
        # nosniff: a browser must not guess another type from the bytes of a picture.
        headers = {"Content-Type": stored[1], "X-Content-Type-Options": "nosniff"}
        return Response(stored[0], headers=headers)

    async def generations(self, request: Request) -> Response:
        # A missing header is accepted: the body is parsed as JSON in any case.
        kind = request.headers.get("content-type", "application/json")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise ApiError(
                415, "expected Content-Type: application/json", code="unsupported_media"
            )
        async with self._bodies.read(request) as body:
            # In a thread, as megabytes of JSON would hold up the loop that answers
            # everyone.
            fields = await asyncio.to_thread(request_fields.of_json, body)
        return await self._answer("generations", request, fields, {})

    async def edits(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise ApiError(
                415,
                "expected Content-Type: multipart/form-data",
                code="unsupported_media",
            )
        async with self._bodies.read(request) as body:
            texts, files = await request_bodies.form(request, body)
        fields = request_fields.of_form(texts)
        if "image" not in files:
            raise invalid(
                "image: expected a file", "image", "missing_required_parameter"
            )
        return await self._answer("edits", request, fields, files)

    async def _answer(
        self, kind: str, request: Request, fields: dict, files: Mapping[str, bytes]
    ) -> Response:
        service, began = self._service, time.monotonic()
        # Before uploads are decoded, which is wasted work if nothing can be painted.
        if service.draining or service.engine.fault is not None:
            raise stopping()
        if not service.warm:
            raise ApiError(503, "programs are being compiled", code="starting", wait=10)
        # In a thread, because uploads are decoded there.
        image_request, paths = await asyncio.to_thread(service.read, fields, files)
        # The painter's callbacks come from a thread of JAX, and asyncio.Queue is not
        # thread-safe: they enter through the loop.
        loop, feed = asyncio.get_running_loop(), asyncio.Queue()

        def preview(i: int, step: int, rgb: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(feed.put_nowait, (i, step, rgb))

        tickets = []
        try:
            tickets = service.submit(
                image_request, preview if image_request.partial_images else None
            )
            if image_request.stream:
                events = service.events(kind, image_request, tickets, feed)
                release = functools.partial(service.release, tickets, paths)
                paths = []  # the stream's own from here on
                body = server_events(events, release)
                return StreamingResponse(
                    body,
                    headers={
                        "Content-Type": "text/event-stream",
                        "Cache-Control": "no-cache",
                        "X-Accel-Buffering": "no",  # nginx would hold events back
                    },
                )
            answer = service.answer(image_request, tickets, str(request.base_url))
            # A stream needs no such watch: StreamingResponse ends it when the client
            # leaves.
            content = await unless_gone(request, answer)
            return JSONResponse(content)
        finally:
            # A stream releases its uploads itself, unless an error precedes its
            # response.
            if not image_request.stream or paths:
                service.release(tickets, paths)
            service.metrics.seconds.labels("request").observe(time.monotonic() - began)


async def unless_gone(request: Request, answer) -> Any:
    """The answer; cancelled once the client has gone."""
    work = asyncio.ensure_future(answer)
    disconnect = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            # nginx's code for a client that closed its connection; nobody reads the
            # body, but the metrics count the status.
            raise ApiError(499, "the client has gone", code="client_gone")
        return work.result()
    finally:
        work.cancel()
        disconnect.cancel()


async def disconnected(request: Request) -> None:
    # The body has been read, so that the next message can only be the disconnect.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def server_events(events, release) -> AsyncIterator[str]:
    """Events as text; an error after the head is an event too."""
    try:
        async for event in events:
            # Server-sent events: a blank line ends each one (WHATWG HTML, section 9.2).
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
    # The status 200 has been sent by now.
    except ApiError as error:
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
    except Exception:
        log.exception("a stream failed")
        error = ApiError(500, "internal error", code="server_error")
        yield f"event: error\ndata: {json.dumps(error.body())}\n\n"
    finally:
        # Also when Starlette closes the generator because the client has disconnected.
        release()


# --- errors


async def answer_error(request: Request, error: Exception) -> Response:
    return JSONResponse(error.body(), error.status, error.headers)


async def answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own: unknown paths and methods."""
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request")
    answer = ApiError(error.status_code, str(error.detail), code=code)
    return JSONResponse(answer.body(), error.status_code, error.headers)


async def answer_bug(request: Request, error: Exception) -> Response:
    # Raised while a body is read; it is no fault of the server.
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    answer = ApiError(500, "internal error", code="server_error")
    return JSONResponse(answer.body(), 500)
