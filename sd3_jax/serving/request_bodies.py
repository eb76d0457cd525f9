"""Bodies of requests, within limits of bytes and time, and the parts of forms."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from python_multipart.exceptions import MultipartParseError
from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from sd3_jax.foreign_text import shown
from sd3_jax.serving.api_errors import ApiError, invalid
from sd3_jax.serving.limits import Limits


class Bodies:
    """Reads bodies, and counts the bytes of those that are being read."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._reading = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body, within the limits of bytes and of time."""
        limits, size, chunks = self._limits, 0, []
        try:
            try:
                async with asyncio.timeout(limits.read_s):
                    # Counted as it arrives: Content-Length is missing in chunked
                    # requests, and a client may state it falsely.
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._reading += len(chunk)
                        self._require_room(size)
                        chunks.append(chunk)
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body did not arrive within {limits.read_s:g} s",
                    code="body_timeout",
                ) from None
            # Counted until the caller has parsed it, for until then its bytes are held.
            yield b"".join(chunks)
        finally:
            self._reading -= size

    def _require_room(self, size: int) -> None:
        """ApiError for a body of over so many bytes, or too many bodies at once."""
        limits = self._limits
        if size > limits.body_bytes:
            raise ApiError(
                413,
                f"the body has over {limits.body_bytes} bytes",
                code="body_too_large",
            )
        # Without a bound on the sum, many bodies below the limit use up the memory.
        if self._reading > limits.all_bodies:
            raise ApiError(429, "too many uploads at once", code="busy", wait=1)


async def form(
    request: Request, body: bytes
) -> tuple[dict[str, str], dict[str, bytes]]:
    """The texts and files of a multipart body; ApiError for what is none."""

    # The parser reads a stream; here it gets the body that was counted already.
    async def stream():
        yield body

    parser = MultiPartParser(request.headers, stream(), max_files=4, max_fields=64)
    try:
        parts = await parser.parse()
    except (MultiPartException, MultipartParseError, UnicodeError, KeyError) as error:
        reason = getattr(error, "message", "") or str(error)
        raise invalid(f"not multipart: {reason}", code="invalid_multipart") from None
    try:
        return await sorted_parts(parts)
    finally:
        await parts.close()


async def sorted_parts(parts: FormData) -> tuple[dict[str, str], dict[str, bytes]]:
    texts: dict[str, str] = {}
    files: dict[str, bytes] = {}
    for name, value in parts.multi_items():
        name = name.removesuffix("[]")  # as clients send lists
        if name in texts or name in files:
            raise invalid(f"{shown(name)}: expected once", shown(name))
        if isinstance(value, str):
            texts[name] = value
        elif name in ("image", "mask"):
            files[name] = await value.read()
        else:
            raise invalid(
                f'unknown file "{shown(name)}"; expected image or mask',
                shown(name),
                "unknown_parameter",
            )
    return texts, files
