"""Pictures over HTTP: OpenAI's Images API in front of the painters of `sample`.

The main thread waits for signals, one thread paints, another answers HTTP. Of several
processes, process 0 answers and hands its batches to the others.
"""

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.distributed import processes, sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.sampling import compiled
from sd3_jax.sampling.job import output_filter, prompt_file
from sd3_jax.sampling.job.row_batches import batch_size
from sd3_jax.sampling.job.task_batches import filled
from sd3_jax.serving import extra

log = logging.getLogger(__name__)
PACKAGES = ("prometheus_client", "python_multipart", "starlette", "uvicorn")
POLL = 0.2  # seconds between two looks of the main thread
SENDING = 10.0  # seconds for answers that are being sent when all is painted


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Serve until SIGTERM, then finish what waits."""
    extra.require("serve", PACKAGES)
    # Imported after that check: these modules need the packages of the extra.
    from sd3_jax.serving import hosts, row_painters, uploads

    workdir = epath.Path(workdir)
    limits = limits_of(config)
    guard = output_filter.load(
        config.sample.filter, config.sample.watermark, limits.sizes
    )
    mesh = sharding.make_mesh(**config.mesh)
    relay = Relay()
    # Of several hosts each would call back for its rows alone.
    previews = limits.partial_images > 0 and jax.process_count() == 1
    preview = relay.preview if previews else None
    with processes.stopping() as stop, compiled.on(mesh):
        watchdog.expect("the weights", watchdog.LONG)
        if config.weights:
            painter = row_painters.released(config, mesh, preview)
        else:
            painter = row_painters.trained(config, workdir, mesh, preview)
        # As many pictures as a batch takes: one program serves one request or many.
        size = batch_size(config.sample.batch_size, config.sample.batch_size, mesh)
        paint = functools.partial(paint_batch, painter, guard, mesh, size)
        spool = uploads.Spool()
        try:
            if jax.process_index() == 0:
                # OpenAI's partial images need previews; without them the field is
                # refused with a 400.
                limits = limits._replace(
                    partial_images=limits.partial_images if previews else 0
                )
                serve(config, limits, painter, guard, mesh, paint, spool, relay, stop)
            else:
                hosts.follow(config, paint, stop, spool)
        finally:
            spool.close()


class Relay:
    """The program's preview function, made before the engine that listens to it."""

    def __init__(self):
        self.listener: Callable | None = None

    def preview(self, step: Any, t: Any, rgb: Any) -> None:
        if self.listener is not None:
            self.listener(step, t, rgb)


def serve(config, limits, painter, guard, mesh, paint, spool, relay, stop) -> None:
    """Process 0: compile, then answer HTTP until `stop`."""
    from sd3_jax.serving import app, hosts, http_server, warm_up

    # Warm-up compiles through it too, as every process must compile the same programs.
    everywhere = hosts.handed_to_all(paint)
    parts = assemble(config, limits, painter, guard, mesh, everywhere, spool)
    service, queue, painting = parts
    # The painter's programs hold the relay, so that they exist before the engine does.
    relay.listener = painting.preview
    application = app.build(
        service,
        keys=api_keys(config.serve.keys_file),
        origins=config.serve.cors,
        most=config.serve.open_requests,
    )
    # Bound before minutes are spent on compilation; /readyz says 503 until then.
    address = config.serve.host, config.serve.port
    http = http_server.HttpServer(
        application,
        http_server.bound_socket(*address, "serve"),
        read_s=limits.read_s,
        proxies=config.serve.proxies,
    )
    http.start()
    try:
        warm_up.compile_programs(config, limits, service, everywhere, painter, stop)
        painting.start()
        if not stop():
            log.info("serving %s at http://%s:%d", service.model, *http.address)
        # A sleep and not a lock: signals are answered between two looks.
        while not stop() and painting.alive and http.alive:
            time.sleep(POLL)
        drain(service, queue, painting, config.serve.drain_s)
    finally:
        http.stop(SENDING)
    if painting.fault is not None:
        # main maps it to the exit code: a lost device asks for a restart.
        raise painting.fault
    if painting.alive:
        # Python would wait for XLA in the painter's thread, and peers for its batch.
        watchdog.leave("stopped after config.serve.drain_s", 0)
    if jax.process_count() > 1:
        # The others return from `follow`, and all processes exit with 0.
        everywhere.stop()


def assemble(config, limits, painter, guard, mesh, paint, spool) -> tuple:
    """The service, its queue and the engine behind it."""
    from sd3_jax.serving.batch_queue import BatchQueue
    from sd3_jax.serving.engine import Engine
    from sd3_jax.serving.service import Service
    from sd3_jax.serving.service_metrics import ServiceMetrics

    size = batch_size(config.sample.batch_size, config.sample.batch_size, mesh)
    queue = BatchQueue(most=limits.queue, size=size, wait_s=limits.wait_s)
    metrics = ServiceMetrics(size, lambda: len(queue))
    several = jax.process_count() > 1
    painting = Engine(paint, queue, metrics, size=size, several=several)
    service = Service(
        config,
        limits,
        painter,
        guard,
        queue,
        painting,
        metrics,
        spool,
        model=model_name(config),
        programs=set(),
    )
    return service, queue, painting


def drain(service, queue, painting, seconds: float) -> None:
    """Paint what waits, refuse what comes."""
    service.draining = True
    queue.close()
    log.info("stopping: %d pictures wait", len(queue))
    if not painting.join(seconds):
        from sd3_jax.serving.service import stopping

        log.warning("config.serve.drain_s = %g: some pictures are not painted", seconds)
        queue.fail(stopping())


def paint_batch(painter, guard, mesh: Mesh, size: int, rows: Sequence) -> Any:
    """Pictures of rows and the filter's verdicts; every process makes this call."""
    from sd3_jax.serving.engine import Batch

    # Always `size` rows, so that the program, and the last bits of a picture, do not
    # depend on how many came together.
    with compiled.on(mesh):  # the mesh of a context is that of its thread alone
        images, failures = painter.paint(filled(rows, size))
    failures = {i: reason for i, reason in failures.items() if i < len(rows)}
    if images is None:
        return Batch(None, failures, [])
    images = images[: len(rows)]
    flags = guard.flags(images, [row.task.caption for row in rows])
    return Batch(images, failures, flags)


def limits_of(config: ConfigDict):
    """config.serve as Limits; UserError for sizes that the recipe cannot have."""
    from sd3_jax.config.validation import validate
    from sd3_jax.serving.limits import Limits

    serve = config.serve
    sizes = []
    for text in serve.sizes:
        width, height = map(int, text.split("x"))
        sized = config.copy_and_resolve_references()
        # Each size must suit the model: a multiple of its patch, at most its positions.
        sized.image.update(height=height, width=width)
        try:
            validate(sized)
        except UserError as error:
            raise UserError(f"config.serve.sizes = {text}: {error}") from None
        sizes.append((height, width))
    prompt_file.task(config, "", 0)  # refuses a picture to change
    return Limits(
        tuple(sizes) or ((config.image.height, config.image.width),),
        n=serve.max_n,
        # The configured steps are the default of a request, which must be allowed.
        steps=max(serve.max_steps, config.sample.steps),
        prompt_bytes=serve.prompt_bytes,
        body_bytes=serve.body_bytes,
        all_bodies=serve.all_bodies,
        pixels=serve.pixels,
        queue=serve.queue,
        wait_s=serve.wait_ms / 1000,
        request_s=serve.request_s,
        read_s=serve.read_s,
        partial_images=serve.partial_images,
        kept=serve.kept,
    )


def model_name(config: ConfigDict) -> str:
    if config.serve.model:
        return config.serve.model
    if config.weights:
        return os.path.basename(config.weights.rstrip("/")) or "sd3"
    return config.model.name


def api_keys(path: str) -> list[str]:
    """The lines of the file; UserError if it is missing or empty."""
    if not path:
        return []
    try:
        lines = epath.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"config.serve.keys_file = {path}: {reason}") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(
            f"config.serve.keys_file = {path}: has no key; write one a line, or set"
            " --config.serve.keys_file= to serve without keys"
        )
    return keys
