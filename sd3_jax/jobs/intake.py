"""How jobs go through pictures of other hands: the parts of the input, and in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from ml_collections import ConfigDict

from sd3_jax.data import ingest
from sd3_jax.data.ingest import Part
from sd3_jax.errors import UserError


def planned(config: ConfigDict, **options) -> list[Part]:
    """The parts of config.ingest.inputs; a UserError names the key."""
    if not config.ingest.inputs:
        raise UserError(
            "config.ingest.inputs = (): wanted folders of pictures, tars or parquet"
            " files, or globs of them"
        )
    try:
        return ingest.plan(config.ingest.inputs, **options)
    except UserError as error:
        raise UserError(f"config.ingest.inputs: {error}") from None


def in_order(
    pool: ThreadPoolExecutor, function: Callable, things: Iterable, ahead: int
) -> Iterator:
    """function(thing) of each, in their order, `ahead` of them at a time."""
    running = deque()
    try:
        for thing in things:
            running.append(pool.submit(function, thing))
            if len(running) > ahead:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for one in running:
            one.cancel()
