"""A model behind a queue: requests become tickets, painted pictures become answers."""

import asyncio
import base64
import functools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sd3_jax import pictures
from sd3_jax.errors import UserError
from sd3_jax.sampling.job import picture_lines, task_lines
from sd3_jax.sampling.job.output_filter import Safety
from sd3_jax.serving import request_tasks, uploads
from sd3_jax.serving.api_errors import ApiError, invalid, of_mistake
from sd3_jax.serving.batch_queue import BatchQueue, Ticket, timed_out
from sd3_jax.serving.engine import Engine, Picture
from sd3_jax.serving.limits import Limits, size_text
from sd3_jax.serving.picture_store import PictureStore
from sd3_jax.serving.request_fields import NAMES
from sd3_jax.serving.request_tasks import Asked, Row
from sd3_jax.serving.row_painters import RowPainter
from sd3_jax.serving.service_metrics import ServiceMetrics

log = logging.getLogger(__name__)
KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
EVENTS = {"generations": "image_generation", "edits": "image_edit"}


class Service:
    """What the routes call. Its methods run in threads of HTTP, and paint nothing."""

    def __init__(
        self,
        config: ConfigDict,
        limits: Limits,
        painter: RowPainter,
        guard: Safety,
        queue: BatchQueue,
        engine: Engine,
        metrics: ServiceMetrics,
        spool: uploads.Spool,
        *,
        model: str,
        programs: set | None,
    ):
        self.config, self.limits, self.model = config, limits, model
        self.metrics, self.engine = metrics, engine
        self.store = PictureStore(limits.kept)
        self.created = int(time.time())
        # What is compiled; None: a request may wait while its program is compiled.
        self.programs = programs
        self.warm = self.draining = False
        self._painter, self._guard, self._queue = painter, guard, queue
        self._spool = spool
        metrics.ready.set_function(lambda: float(self.ready))

    @property
    def ready(self) -> bool:
        healthy = self.engine.alive and self.engine.fault is None
        return self.warm and healthy and not self.draining

    # --- from fields to tickets

    def read(
        self, fields: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> tuple[Asked, list[str]]:
        """The request's pictures, and the paths of its uploads; or an ApiError."""
        name, paths = secrets.token_hex(8), {}
        try:
            for kind, data in files.items():
                check = {"image": uploads.checked_image, "mask": uploads.mask_file}
                data = check[kind](data, self.limits.pixels)
                paths[kind] = self._spool.write(f"{name}-{kind}", data)
            request = request_tasks.asked(
                fields,
                self.config,
                self.limits,
                model=self.model,
                adapters=self._painter.adapters,
                files=paths,
            )
            self._require(request.rows[0])
        except BaseException:
            self._spool.remove(paths.values())
            raise
        return request, list(paths.values())

    def _require(self, row: Row) -> None:
        try:
            self._painter.require(row)
        except UserError as error:
            raise of_mistake(error, NAMES) from None
        program = self._painter.key(row).program
        if self.programs is not None and program not in self.programs:
            raise invalid(
                "the server has not compiled a program for this solver, guidance or"
                " kind of request; leave them out, or ask its operator",
                code="program_not_compiled",
            )

    def submit(
        self, request: Asked, preview: Callable[[int, int, Any], None] | None = None
    ) -> list[Ticket]:
        """The tickets of a request in the queue; 429 if it is full."""
        deadline = time.monotonic() + self.limits.request_s
        name = secrets.token_hex(8)
        tickets = [
            Ticket(
                row,
                self._painter.key(row),
                name,
                deadline,
                functools.partial(preview, i) if preview else None,
                row.task.settings["steps"],
            )
            for i, row in enumerate(request.rows)
        ]
        self._queue.put(tickets)
        return tickets

    async def painted(self, ticket: Ticket) -> Picture:
        """The ticket's picture; ApiError once its time is over."""
        future = asyncio.wrap_future(ticket.future)
        try:
            # Queued pictures fail by themselves; this is for those that are painted.
            remaining = ticket.deadline - time.monotonic()
            return await asyncio.wait_for(future, remaining + 1)
        except TimeoutError:
            raise timed_out() from None
        except UserError as error:
            raise of_mistake(error, NAMES) from None

    def release(self, tickets: Sequence[Ticket], paths: Sequence[str]) -> None:
        """Forgets what is not painted yet, and removes uploads once nothing is."""
        for ticket in tickets:
            # False for a ticket that is being painted: a batch cannot be interrupted.
            ticket.future.cancel()
        running = [ticket.future for ticket in tickets if not ticket.future.done()]
        if not paths:
            return
        if not running:
            self._spool.remove(paths)
            return
        # A running batch still reads them.
        running[-1].add_done_callback(lambda _: self._spool.remove(paths))

    # --- from pictures to answers

    def file_of(self, request: Asked, row: Row, picture: Picture) -> bytes:
        """The picture's file, with its line of JSON inside as `sample` writes it."""
        began = time.monotonic()
        facts = self._painter.facts | self._guard.facts()
        facts |= picture_lines.encoding(request.suffix[1:], request.quality)
        line = task_lines.describe(row.task, facts, {}, request.suffix[1:])
        # Row and size: the same row of a batch of this size repeats the last bits.
        line |= {"batch": list(picture.slot)}
        if row.adapters:
            line["adapters"] = row.adapters
        if picture.flag:
            line["filtered"] = picture.flag
        line = _without_paths(line)
        image = self._guard.finished(picture.image, picture.flag)
        enlarged = self.config.image.autoencoder == "pixels" and not self.config.weights
        tile = pictures.enlarged(image) if enlarged else image
        data = picture_lines.encoded(tile, request.suffix, line, request.quality)
        self.metrics.seconds.labels("encode").observe(time.monotonic() - began)
        return data

    def seed_of(self, row: Row) -> int:
        """The seed that repeats this picture as the first of a request."""
        # generate() seeds by seed + number; a run folds the number into the seed's key.
        is_run = "step" in self._painter.facts
        return row.task.settings["seed"] + (0 if is_run else row.task.number)

    async def answer(
        self, request: Asked, tickets: Sequence[Ticket], base: str
    ) -> dict:
        """The JSON of a request without a stream."""
        data = []
        for ticket in tickets:
            picture = await self.painted(ticket)
            file = await asyncio.to_thread(self.file_of, request, ticket.row, picture)
            entry = {"seed": self.seed_of(ticket.row)}
            if picture.flag:
                entry["filtered"] = picture.flag
            if request.response_format == "url":
                kind = KINDS[request.suffix]
                name = self.store.add(file, request.suffix, kind)
                data.append({"url": f"{base}pictures/{name}"} | entry)
            else:
                data.append({"b64_json": base64.b64encode(file).decode()} | entry)
        return {"data": data} | self._about(request, "created")

    async def events(
        self, kind: str, request: Asked, tickets: Sequence[Ticket], feed: asyncio.Queue
    ) -> AsyncIterator[dict]:
        """The events of a stream: partial pictures, and each picture at its end.

        `feed` gets (picture, step, latents' rgb) from the painter's previews.
        """
        for i, ticket in enumerate(tickets):
            finish = lambda _, i=i: feed.put_nowait((i, None, None))
            waiting = asyncio.ensure_future(_quiet(self.painted(ticket)))
            waiting.add_done_callback(finish)
        counts, unfinished = [0] * len(tickets), len(tickets)
        about = self._about(request, "created_at") | {"background": "opaque"}
        about["quality"] = "auto"
        while unfinished:
            i, step, rgb = await feed.get()
            ticket = tickets[i]
            common = about | {"image_index": i}
            if step is not None:
                due = _partial_steps(ticket.steps, request.partial_images)
                # A step that is due twice gets one preview.
                if step not in due[counts[i] :]:
                    continue
                file = await asyncio.to_thread(self._partial, request, ticket.row, rgb)
                yield common | {
                    "type": f"{EVENTS[kind]}.partial_image",
                    "partial_image_index": counts[i],
                    "b64_json": base64.b64encode(file).decode(),
                }
                counts[i] += 1
                continue
            unfinished -= 1
            picture = await self.painted(ticket)
            file = await asyncio.to_thread(self.file_of, request, ticket.row, picture)
            yield common | {
                "type": f"{EVENTS[kind]}.completed",
                "b64_json": base64.b64encode(file).decode(),
                "seed": self.seed_of(ticket.row),
                "usage": _usage(),
            }

    def _partial(self, request: Asked, row: Row, rgb: np.ndarray) -> bytes:
        """A rough picture of latents at the size of the result."""
        rough = pictures.to_uint8(2 * np.asarray(rgb, np.float32) - 1)
        height, width = row.task.size
        image = Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)
        line = {"prompt": row.task.caption, "partial": True}
        return picture_lines.encoded(image, request.suffix, line, request.quality)

    def _about(self, request: Asked, created: str) -> dict:
        size = request.rows[0].task.size
        format = {".jpg": "jpeg"}.get(request.suffix, request.suffix[1:])
        return {
            created: int(time.time()),
            "size": size_text(size),
            "output_format": format,
        }


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping", wait=5)


def _partial_steps(steps: int, count: int) -> list[int]:
    """The steps after which partial pictures are due: the thirds for 2, and so on."""
    return [(k + 1) * steps // (count + 1) - 1 for k in range(count)]


def _usage() -> dict:
    # Clients' types demand it; tokens are no unit of this model.
    details = {"image_tokens": 0, "text_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": 0,
        "total_tokens": 0,
    }


def _without_paths(line: dict) -> dict:
    """A line whose uploads have no path: they are fingerprints alone."""
    paths = {line["settings"][x] for x in ("image", "mask") if x in line["settings"]}
    names = {path: Path(path).name.rpartition("-")[2] for path in paths}
    settings = {
        key: names.get(value, value) if isinstance(value, str) else value
        for key, value in line["settings"].items()
    }
    line = line | {"settings": settings}
    if "inputs" in line:
        line["inputs"] = {names.get(x, "file"): y for x, y in line["inputs"].items()}
    return line


async def _quiet(coroutine) -> None:
    """Waits, and leaves errors to who asks for the result."""
    try:
        await coroutine
    except Exception as error:
        log.debug("a picture of a stream failed: %s", error)
