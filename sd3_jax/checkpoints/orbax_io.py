"""Orbax with this project's settings, and its errors as one line of a known kind."""

import contextlib
import errno
import logging
from collections.abc import Iterator

from etils import epath
from orbax.checkpoint import v1 as ocp

from sd3_jax.checkpoints import integrity
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.errors import RetryableError, UserError, explained, os_code

JSON = ("data", "config", "about")  # a step's items beside "state"


# Orbax logs pages of traceback for what it also raises; here that becomes one line.
logging.getLogger("absl").addFilter(
    lambda record: not ("orbax" in record.pathname and record.exc_info)
)


def orbax_context(*, partial: bool = False) -> ocp.Context:
    """Orbax's settings; with `partial`, a tree may name some of the stored leaves."""
    # JSON by name: otherwise orbax chooses a handler by what the leaves are.
    registry = ocp.handlers.local_registry()
    for name in JSON:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    context.async_options.create_directories_asynchronously = False  # fail at once
    # Of a leaf that several devices hold each writes a part, cut out by a program of
    # its own: for small leaves, compiling those takes longer than writing.
    context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
    context.pytree.loading.partial_load = partial
    return context


def load(path: epath.Path, abstract: dict, *, partial: bool = False) -> dict:
    """The items of a step that `abstract` names, in its shardings; see `readable`."""
    with readable(path), orbax_context(partial=partial):
        return ocp.load_checkpointables(path, abstract)


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """Raise by cause what orbax fails to read inside: damage, storage or access.

    Orbax's own error proves nothing: a read that failed once looks like a file that
    is cut. The checksums of the files decide, where the step has them.
    """
    action = f"cannot read {path}"
    try:
        with explained(action, UnreadableCheckpoint):
            yield
    except UnreadableCheckpoint as fault:
        code = os_code(fault.__cause__.__cause__ or fault.__cause__)
        denied = code not in (None, errno.ENOENT) or "PERMISSION_DENIED" in str(fault)
        if denied:  # a step that may not be read must not be set aside as damaged
            raise UserError(f"{fault}; nothing was changed") from fault.__cause__
        if integrity.check_files(path, shared=False):
            reason = str(fault).removeprefix(f"{action}: ")
            raise RetryableError(
                f"{action}, though its files have the right checksums: {reason}"
            ) from fault.__cause__
        raise
