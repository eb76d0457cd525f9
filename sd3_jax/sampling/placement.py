"""Where a bundle's weights are: on the devices, or on the host until they are used."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sd3_jax.errors import UserError
from sd3_jax.sampling import argument_checks

# "sequential": in host memory; on the devices while a program uses them.
PLACEMENTS = ("all", "sequential")
# Pinned: pages that cannot be swapped out, from which a device copies at full speed.
HOST, DEVICE = "pinned_host", "device"  # jax's memory kinds


def check(placement: Any) -> None:
    """UserError for an unknown placement, or one that this machine cannot have."""
    argument_checks.choice("placement", placement, PLACEMENTS)
    if placement == "all":
        return
    # Every process would have to move its shards at the same time.
    if jax.process_count() > 1:
        raise UserError(
            f'placement "{placement}" with {jax.process_count()} processes: expected'
            ' one; use "all", which shards the weights over all devices'
        )
    kinds = [memory.kind for memory in jax.devices()[0].addressable_memories()]
    if HOST not in kinds:
        raise UserError(
            f'placement "{placement}": the device has memories of the kinds'
            f' {", ".join(kinds)}; expected {HOST}; use "all"'
        )


def at_rest(shapes: Any, placement: str) -> Any:
    """Shapes of weights with the shardings that they have while nothing runs."""
    if placement == "all":
        return shapes
    on_host = lambda x: x.sharding.with_memory_kind(HOST)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_host(x))
    return jax.tree.map(shape, shapes)


class Stage:
    """Copies on the devices of weights that rest on the host, for one program.

    A leaf that two components share, or that two programs use in turn, is copied once.
    """

    def __init__(self) -> None:
        # By id; the leaf on the host is kept too, so that no other takes its id.
        self._copies: dict[int, tuple[Array, Array]] = {}

    def enter(self, arguments: Any, *, room: float | None = None) -> Any:
        """A program's arguments, with weights on the host replaced by device copies.

        Copies that the program does not use are dropped first, unless the devices have
        `room` bytes free. Work that reads them must be complete by then. UserError
        inside a caller's jit.
        """
        resting = {id(x): x for x in jax.tree.leaves(arguments) if _rests(x)}
        # With enough room copies stay, which spares their transfer at the next call.
        if room is None or free_memory() < room:
            self._copies = {k: x for k, x in self._copies.items() if k in resting}
        if absent := {k: x for k, x in resting.items() if k not in self._copies}:
            _require_no_trace()
            # All leaves in one call of device_put, so that the transfers overlap.
            copies = _on_devices(absent.values())
            self._copies |= {k: (absent[k], copy) for k, copy in zip(absent, copies)}
        placed = lambda x: self._copies[id(x)][1] if _rests(x) else x
        return jax.tree.map(placed, arguments)

    def clear(self) -> None:
        self._copies = {}


def free_memory() -> int:
    """Bytes that are free on the fullest device; 0 where jax does not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    # A CPU's memory_stats() is None: 0 bytes are free, and copies are always dropped.
    sizes = [x.get("bytes_limit", 0) - x.get("bytes_in_use", 0) for x in stats]
    return min(sizes)


def _rests(x: Any) -> bool:
    concrete = isinstance(x, Array) and not isinstance(x, jax.core.Tracer)
    return concrete and x.sharding.memory_kind == HOST


def _on_devices(leaves: Iterable[Array]) -> list[Array]:
    leaves = list(leaves)
    places = [x.sharding.with_memory_kind(DEVICE) for x in leaves]
    return jax.device_put(leaves, places)


def _require_no_trace() -> None:
    # Inside a trace the copies would be constants of the caller's program, which keeps
    # them for good.
    if isinstance(jnp.zeros(()), jax.core.Tracer):
        raise UserError(
            'a bundle of placement "sequential" inside jax.jit: its weights move'
            ' between programs; load it with placement="all"'
        )
