"""The bar of `generate(..., progress=True)`, which counts the steps of the solver."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sd3_jax.errors import UserError

# The bars that are shown now. A callback is part of a compiled program, which serves
# many calls, so it has to look up the bar of the call that runs.
_bars: list = []


def checked(preview: Any, progress: Any) -> Callable | None:
    """generate's `preview`, which with `progress` moves the bar too."""
    if preview is not None and not callable(preview):
        raise UserError(f"preview {preview!r}: expected a function of (step, t, rgb)")
    return counted(preview) if progress else preview


@functools.lru_cache(maxsize=16)
def counted(preview: Callable | None) -> Callable:
    """A preview that also moves the bar; the same for equal arguments.

    Each function that is called after a step compiles a program, so there is one alone.
    """

    def after_step(step, t, rgb) -> None:  # arrays of jax or numpy
        if _bars:
            _move(_bars[-1], int(step) + 1)
        if preview is not None:
            preview(step, t, rgb)

    return after_step


@contextlib.contextmanager
def shown(steps: int, progress: bool) -> Iterator[None]:
    """Show a bar of `steps`, in a notebook as a widget; process 0 alone does."""
    if not progress:
        yield
        return
    from tqdm.auto import tqdm

    with tqdm(total=steps, unit="step", disable=jax.process_index() != 0) as bar:
        _bars.append(bar)
        try:
            yield
            jax.effects_barrier()  # the last callbacks have been called
        finally:
            _bars.remove(bar)


def _move(bar, done: int) -> None:
    if bar.n == 0 and not bar.disable:
        bar.unpause()  # the first step's time has the compilation in it
    bar.update(max(0, done - bar.n))  # callbacks of several devices have no order
