"""Programs that are compiled before the first request."""

import io
import json
import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sd3_jax.distributed import watchdog
from sd3_jax.errors import UserError
from sd3_jax.monitoring.progress import duration
from sd3_jax.serving.api_errors import ApiError
from sd3_jax.serving.limits import Limits, size_text
from sd3_jax.serving.row_painters import RowPainter
from sd3_jax.serving.service import Service

log = logging.getLogger(__name__)


def compile_programs(
    config: ConfigDict,
    limits: Limits,
    service: Service,
    paint: Callable,
    painter: RowPainter,
    stop: Callable[[], bool],
) -> None:
    """Compile the programs of every size, kind and solver by painting a batch."""
    began, programs = time.monotonic(), service.programs
    # Through Service.read, as real requests come: a key that differed in anything would
    # leave the program that clients need uncompiled.
    for fields, files in warm_requests(config, limits):
        if stop():
            return
        # None while this request is read, since its own program is not in the set yet.
        service.programs = None
        watchdog.expect("a program for requests", watchdog.LONG)
        try:
            request, paths = service.read(fields, files)
        except ApiError as error:
            raise UserError(f"config.serve: cannot warm up: {error}") from None
        row = request.rows[0]
        program = painter.key(row).program
        # paint_batch fills up the one row to the size of a batch, so the program is
        # that of full ones too.
        if program not in programs:
            log.info("compiling for %s", json.dumps(fields))
            paint([row])
            programs.add(program)
        service.release([], paths)
    # "compile" lets later requests compile as well; the default refuses them with a
    # 400.
    compiles = config.serve.unwarmed == "compile"
    service.programs = None if compiles else programs
    service.warm = True
    text = duration(time.monotonic() - began)
    log.info("%d programs are ready after %s", len(programs), text)


def warm_requests(
    config: ConfigDict, limits: Limits
) -> Iterator[tuple[dict, dict[str, bytes]]]:
    """(fields, files) of one request for each program to compile."""
    for size in limits.sizes:
        for solver in ("", *config.serve.solvers):
            for kind in config.serve.kinds:
                fields = {"prompt": "a picture", "size": size_text(size), "seed": 0}
                fields |= {"solver": solver} if solver else {}
                grey = np.full((*size, 3), 128, np.uint8)
                # All is repainted: a black mask is refused.
                white = np.full(size, 255, np.uint8)
                files = {"image": grey, "mask": white}
                names = {"generate": (), "image": ("image",), "mask": ("image", "mask")}
                yield fields, {name: png_of(files[name]) for name in names[kind]}


def png_of(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
