"""The voting page and its API as a Starlette application.

    GET  /                    the page
    GET  /voter/TOKEN         a voter's link: sets the cookie, then the page
    POST /api/voter           {"name"}: sets the cookie, where anyone may vote
    GET  /api/pairs           ?count=2&skip=PAIR:AGAIN…: pairs to judge, and progress
    POST /api/votes           {"id", "pair", "again", "question", "answer"}
    POST /api/undo            {"id"}: takes back a vote
    GET  /picture/TOKEN.png   a picture; its address does not name its source

Errors are {"error": {"message", "code"}}. A vote that is not on disk gets 503.
"""

import contextlib
import secrets
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from sd3_jax.foreign_text import parse_json
from sd3_jax.reports import html_page
from sd3_jax.tools.votes.ballot_box import StorageFailed
from sd3_jax.tools.votes.booth import Booth, Refused
from sd3_jax.tools.votes.voters import Voters, is_name

BODY = 4096  # bytes of a request, at most
OFFERS = 4  # pairs of an answer, at most
COOKIE = "voter"
YEAR = 365 * 24 * 3600
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


def build_app(
    booth: Booth, voters: Voters, *, hosts: tuple[str, ...] = ("*",), title: str
) -> Starlette:
    """The application, which answers requests to `hosts` only.

    Another site's name that resolves to this host is refused (DNS rebinding).
    """

    def route(path: str, answer: Callable, method: str = "GET") -> Route:
        return Route(path, partial(answer, booth, voters), methods=[method])

    return Starlette(
        routes=[
            Route("/", partial(_page, booth, voters, title)),
            Route("/healthz", _healthy),
            Route("/favicon.ico", _no_icon),
            route("/voter/{token}", _enter),
            route("/api/voter", _name, "POST"),
            route("/api/pairs", _pairs),
            route("/api/votes", _vote, "POST"),
            route("/api/undo", _undo, "POST"),
            route("/picture/{token}.png", _picture),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers={
            Refused: _refused,
            StorageFailed: _not_stored,
            HTTPException: _http_error,
        },
    )


# --- pages


async def _page(booth: Booth, voters: Voters, title: str, request: Request) -> Response:
    nonce = secrets.token_urlsafe(16)
    # The nonce is for the page's Content-Security-Policy: no script but its own runs.
    text = html_page.render(
        "vote.html",
        title=title,
        nonce=nonce,
        voter=_cookie_name(voters, request) or "",
        by_token=bool(voters.tokens),
        questions=booth.questions,  # in their order
    )
    headers = HEADERS | {"Cache-Control": "no-store"}
    return Response(text, media_type="text/html", headers=headers)


async def _healthy(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _no_icon(request: Request) -> Response:
    # Without the route each page view would log a 404.
    return Response(status_code=204)  # browsers ask for one


async def _enter(booth: Booth, voters: Voters, request: Request) -> Response:
    token = request.path_params["token"]
    # Without tokens a link would set any name as a cookie.
    if not voters.tokens or voters.name(token) is None:
        raise Refused("this link is not one of a voter", "unknown_voter", 403)
    # The redirect takes the token out of the address bar.
    return _with_cookie(RedirectResponse("/", 303, headers=HEADERS), token)


# --- the API


async def _name(booth: Booth, voters: Voters, request: Request) -> Response:
    name = (await _body(request, {"name"}))["name"]
    if voters.tokens:
        raise Refused("open the link that you received", "token_needed", 403)
    if not is_name(name):
        raise Refused("name: expected 1 to 48 letters, digits or spaces", "bad_name")
    return _with_cookie(_json({"voter": name}), name)


async def _pairs(booth: Booth, voters: Voters, request: Request) -> Response:
    voter = _voter(voters, request)
    skipped = set()
    # Bounded: a page has no more pairs than it was offered.
    for text in request.query_params.getlist("skip")[: 2 * OFFERS]:
        pair, _, again = text.partition(":")
        skipped.add((pair, int(again == "1")))
    count = request.query_params.get("count", "1")
    if count not in [str(x) for x in range(OFFERS + 1)]:
        raise Refused(f"count: expected an integer in [0, {OFFERS}]", "bad_count")
    # Pictures are decoded there: not in the loop that answers everyone.
    return _json(await run_in_threadpool(booth.offers, voter, skipped, int(count)))


async def _vote(booth: Booth, voters: Voters, request: Request) -> Response:
    voter = _voter(voters, request)
    fields = await _body(request, {"id", "pair", "again", "question", "answer"})
    return _json(await run_in_threadpool(partial(booth.cast, voter, **fields)))


async def _undo(booth: Booth, voters: Voters, request: Request) -> Response:
    voter = _voter(voters, request)
    fields = await _body(request, {"id"})
    return _json(await run_in_threadpool(booth.undo, voter, fields["id"]))


async def _picture(booth: Booth, voters: Voters, request: Request) -> Response:
    # Only the check matters: pictures are for voters.
    _voter(voters, request)
    png = await run_in_threadpool(booth.picture, request.path_params["token"])
    # private: a shared cache must not hand pictures to those who may not vote.
    headers = HEADERS | {"Cache-Control": "private, max-age=86400"}
    return Response(png, media_type="image/png", headers=headers)


# --- parts


def _cookie_name(voters: Voters, request: Request) -> str | None:
    return voters.name(unquote(request.cookies.get(COOKIE, ""), errors="replace"))


def _voter(voters: Voters, request: Request) -> str:
    name = _cookie_name(voters, request)
    if name is None:
        raise Refused("no voter: open the page first", "unknown_voter", 401)
    return name


def _with_cookie(response: Response, value: str) -> Response:
    # Lax and not strict: a voter's link is opened from a mail, and then the page that
    # it redirects to must get the cookie. Other sites' POSTs do not.
    # Quoted: cookies are ASCII, and names may be of any script.
    response.set_cookie(
        COOKIE, quote(value), max_age=YEAR, httponly=True, samesite="lax"
    )
    return response


async def _body(request: Request, names: set[str]) -> dict:
    """The JSON object of a request, with exactly these names."""
    # Forms of other sites cannot send this type without asking first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused("expected Content-Type: application/json", "bad_type", 415)
    # Read by hand, since request.body() has no limit.
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > BODY:
            raise Refused(f"expected at most {BODY} bytes", "too_large", 413)
    try:
        fields = parse_json(data)
    except ValueError:  # UnicodeDecodeError is one
        raise Refused("not JSON", "bad_json") from None
    if not isinstance(fields, dict) or fields.keys() != names:
        listed = ", ".join(sorted(names))
        raise Refused(f"expected a JSON object of {listed}", "bad_fields")
    return fields


def _json(value: dict) -> Response:
    return JSONResponse(value, headers=HEADERS | {"Cache-Control": "no-store"})


def _error(
    message: str, code: str, status: int, headers: dict[str, str] | None = None
) -> Response:
    body = {"error": {"message": message, "code": code}}
    # Half a surrogate pair would be an error in the answer about it.
    with contextlib.suppress(UnicodeEncodeError):
        return JSONResponse(body, status, headers=HEADERS | (headers or {}))
    return JSONResponse({"error": {"message": "bad text", "code": code}}, status)


async def _refused(request: Request, error: Any) -> Response:
    return _error(str(error), error.code, error.status)


async def _http_error(request: Request, error: Any) -> Response:
    return _error(error.detail, "http", error.status_code)


async def _not_stored(request: Request, error: Exception) -> Response:
    message = f"the vote is not stored: {error}; free some space, then vote again"
    return _error(message, "not_stored", 503, {"Retry-After": "10"})
