"""The step compiled ahead of time, one program for each bucket of image shapes."""

import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
from jax import Array

from sd3_jax.distributed import processes
from sd3_jax.errors import UserError
from sd3_jax.training.state import TrainState

log = logging.getLogger(__name__)
COMPILERS = 4  # programs that are compiled at once
BatchShape = tuple[tuple[str, tuple[int, ...]], ...]


def batch_shape(batch: dict) -> BatchShape:
    """The key of a batch's program: names and shapes, sorted by name."""
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def compile_for_batches(
    step: Callable, state: TrainState, key: Array, batches: Iterable[dict], frozen: dict
) -> dict[BatchShape, Callable]:
    """step(state, key, batch, frozen) compiled for each batch, by its batch_shape.

    `batches` are arrays on the mesh, one of each bucket. Compiled ahead of time, no
    step's time has a compilation in it.
    """
    begin, lowered = time.perf_counter(), {}
    log.info("compiling the step ...")
    for batch in batches:
        # Shapes suffice from here on: the arrays of one bucket need not stay until the
        # next one's are there.
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
        )
        lowered[batch_shape(batch)] = step.lower(state, key, shapes, frozen)
    # Tracing needs the GIL, compiling does not: XLA works on several at once.
    with ThreadPoolExecutor(COMPILERS) as threads:
        programs = dict(zip(lowered, threads.map(compile_or_explain, lowered.values())))
    seconds = time.perf_counter() - begin
    log.info("compiled the step in %.1f s (shapes: %d)", seconds, len(programs))
    # Hosts do not compile equally fast, and on CPUs a collective gives up after half a
    # minute.
    processes.meet("compiled the step")
    return programs


def compile_or_explain(lowered) -> Callable:
    """The compiled program; UserError with advice if it does not fit the memory."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"the step does not fit the memory of {jax.devices()[0].device_kind}; set a"
            " smaller config.data.batch_size, config.optim.accumulate,"
            " --config.model.remat=full or a larger config.mesh.fsdp (sd3-jax plan"
            f" compares them): {' '.join(str(error).split())[:300]}"
        ) from error
