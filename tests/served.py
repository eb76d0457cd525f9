"""A server in a thread of the test, over a painter that the test gives.

with served.running(paint) as server:
    server.client().images.generate(prompt="a fox")
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import openai

from configs import released
from sd3_jax.distributed import sharding
from sd3_jax.jobs import serve
from sd3_jax.sampling.job import output_filter
from sd3_jax.serving import row_painters, uploads
from sd3_jax.serving.row_painters import Key, RowPainter

SIZE = 8  # rows of a batch, one for each virtual device


class Server:
    """The running server; stop() is its SIGTERM, `error` what it ended with."""

    def __init__(self, port: int):
        self.url, self.error = f"http://127.0.0.1:{port}", None
        self._stop = threading.Event()
        self.stop, self.stopped = self._stop.set, self._stop.is_set
        self.thread = None

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, fields=None, path="/v1/images/generations", **options):
        options = {"timeout": 60} | options
        if fields is not None:
            options["json"] = fields
        return httpx.post(self.url + path, **options)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith(name))


def colours(rows) -> tuple[np.ndarray, dict]:
    """Pictures whose bytes are their seeds, without a model."""
    size = rows[0].task.size
    seeds = [row.task.settings["seed"] + row.task.number for row in rows]
    return np.stack([np.full((*size, 3), seed % 256, np.uint8) for seed in seeds]), {}


def fake_painter(paint: Callable = colours, adapters=None) -> RowPainter:
    def key(row) -> Key:
        s = row.task.settings
        pixels = tuple(name for name in ("image", "mask") if name in s)
        return Key((s["height"], s["width"], *pixels), (), True)

    return RowPainter(paint, key, lambda row: None, {"weights": "0"}, adapters or {})


@contextlib.contextmanager
def running(
    paint: Callable = colours,
    *,
    painter: RowPainter | None = None,
    weights: str = "model",
    relay: serve.Relay | None = None,
    adapters=None,
    **keys,
) -> Iterator[Server]:
    """A ready server; `keys` are config.serve's, or sample's as sample_NAME."""
    config = released.get_config("tiny")
    config.weights = weights
    port = free_port()
    config.serve.update(port=port, kinds=("generate", "image", "mask"))
    config.sample.batch_size = SIZE
    for name, value in keys.items():
        group = "sample" if name.startswith("sample_") else "serve"
        config[group][name.removeprefix("sample_")] = value
    limits = serve.limits_of(config)
    mesh = sharding.make_mesh(**config.mesh)
    relay = relay or serve.Relay()
    if painter is None:
        painter = fake_painter(paint, adapters)
    elif callable(painter):
        painter = painter(config, mesh, relay.preview)
    guard = output_filter.load(
        config.sample.filter, config.sample.watermark, limits.sizes
    )
    batch = lambda rows: serve.paint_batch(painter, guard, mesh, SIZE, rows)
    server, spool = Server(port), uploads.Spool()
    server.spool, server.painter = spool, painter

    def run():
        try:
            arguments = config, limits, painter, guard, mesh, batch, spool, relay
            serve.serve(*arguments, server.stopped)
        except Exception as error:
            server.error = error

    server.thread = threading.Thread(target=run, daemon=True)
    server.thread.start()
    try:
        wait(lambda: server.error or is_ready(server), 600)
        assert server.error is None, server.error
        yield server
    finally:
        server.stop()
        server.thread.join(60)
        spool.close()


def released_painter(config, mesh, preview) -> RowPainter:
    return row_painters.released(config, mesh, preview)


def is_ready(server: Server) -> bool:
    try:
        return server.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
