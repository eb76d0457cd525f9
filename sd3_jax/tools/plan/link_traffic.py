"""Bytes that a compiled program sends between chips, and the links it can use.

A collective's bytes are those that a device sends in a ring of its group, with tile
padding. Its time assumes the best links: both directions of each torus axis that the
groups fill, or one direction if the axis does not wrap around.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sd3_jax.tools.plan.hlo import COLLECTIVES, Computation, Instruction, Module
from sd3_jax.tools.plan.loop_trips import trips
from sd3_jax.tools.plan.slices import Slice

Groups = tuple[tuple[int, ...], ...]
Pairs = tuple[tuple[int, int], ...]


class Collective(NamedTuple):
    """One execution, on one device."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which its groups lie
    wire: float  # bytes that a device sends
    groups: Groups
    shape: str
    source: str  # the operation of the JAX program that it was made for
    pairs: Pairs = ()  # of a permutation: who sends to whom
    outside: bool = False  # from slice to slice, by the data center's network


def channel(x: Instruction) -> str:
    """The channel that all parts of one collective share; "" for an unsplit one.

    All of shard_map's have channel 1.
    """
    # A collective that XLA split to overlap it with products appears in several fusions
    # with one channel; chain_id marks its parts.
    number = x.attribute(r"channel_id=(\d+)")
    return number if "chain_id" in x.attributes else ""


def collective(
    x: Instruction, home: Computation, mesh: Mapping[str, int]
) -> Collective | None:
    """The collective that `x`, an instruction of `home`, runs; None if it is none."""
    if x.opcode == "send":
        return _between_slices(x, home, mesh)
    # Bytes are counted at the start of an asynchronous collective; its end moves none.
    kind = x.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # XLA's fused form: an all-reduce of which each device keeps its part.
    if kind == "all-reduce" and home.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    groups = replica_groups(x.attributes, math.prod(mesh.values()))
    whole, shape = _largest(x, kind, home)
    return Collective(
        kind,
        _axes(groups, mesh),
        sent(kind, whole, max(map(len, groups))),
        groups,
        shape,
        x.source,
        _pairs(x.attributes),
    )


def collectives(
    module: Module, mesh: Mapping[str, int]
) -> Iterator[tuple[Collective, int]]:
    """Every collective of a program, and how often a run executes it."""

    def walk(name: str, times: int):
        home = module[name]
        for x in home:
            transfer = collective(x, home, mesh)
            if transfer is not None:
                yield transfer, times
            if x.opcode == "while":
                body = x.attribute(r"body=%?([\w.\-]+)")
                yield from walk(body, times * (trips(x, home, module) or 1))
            # Only one branch runs. The larger one is counted, however rare it is.
            elif x.opcode == "conditional":
                yield from walk(max(x.branches, key=module.size), times)
            elif x.opcode in ("call", "fusion", "async-start", "custom-call"):
                for inner in x.called:
                    if inner in module.computations:
                        yield from walk(inner, times)

    yield from walk(module.entry, 1)


def sent(kind: str, whole: float, members: int) -> float:
    """Bytes that a device sends of an array of `whole` bytes, all members' together."""
    # A ring all-reduce is a reduce-scatter and an all-gather: twice the bytes.
    if kind == "all-reduce":
        return 2 * whole * (members - 1) / members
    if kind in ("collective-permute", "collective-broadcast"):
        return whole
    return whole * (members - 1) / members


def _largest(x: Instruction, kind: str, home: Computation) -> tuple[float, str]:
    """Bytes of a collective's operands or results, whichever is more, and the shape."""
    operands = [
        shape
        for name in x.operands
        if name in home.by_name
        for shape in home.by_name[name].shapes
    ]
    results = x.shapes
    if x.opcode.endswith("-start"):  # (operands, results, …)
        results = x.elements[1] if len(x.elements) > 1 else x.shapes
    sizes = [sum(shape.bytes for shape in shapes) for shapes in (operands, results)]
    # Its operand and result are of one size; newer forms carry more operands.
    if kind == "collective-permute":
        sizes[0] = 0.0
    shapes = operands if sizes[0] > sizes[1] else results
    largest = max(shapes, key=lambda shape: shape.bytes)
    sides = ",".join(map(str, largest.sides))
    return max(sizes), f"{largest.dtype}[{sides}]"


def _between_slices(x, home: Computation, mesh) -> Collective | None:
    """The transfer to other slices that a host makes for a device (megascale)."""
    if "xla_megascale" not in x.attributes:
        return None
    kind = x.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower()
    kind = kind.replace("_", "-")
    others = x.attribute(r'_xla_megascale_target="\{([\d,]*)\}')
    members = max(2, len(others.split(",")))  # the slices
    largest = x.elements[0][0]
    sides = ",".join(map(str, largest.sides))
    whole = largest.bytes * (members if kind == "all-gather" else 1)
    return Collective(
        kind,
        ("data",),
        sent(kind, whole, members),
        (),
        f"{largest.dtype}[{sides}]",
        x.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"'),
        outside=True,
    )


class Links:
    """The links of a slice, as the groups of a program's collectives can use them.

    `devices` are in the order of the program's partitions, the mesh's.
    """

    def __init__(self, tpu_slice: Slice, devices: Sequence):
        self.slice, self.generation = tpu_slice, tpu_slice.generation
        self.places = [
            (getattr(d, "slice_index", None) or 0, *d.coords[: len(tpu_slice.shape)])
            for d in devices
        ]

    def seconds(self, x: Collective) -> float:
        if x.outside:
            return x.wire / self.generation.slice_rate
        if not x.wire:
            return 0.0
        links = self.usable(x.groups)
        if x.pairs:  # a ring that the program makes itself, in both directions
            links = min(2, links) / self.hops(x.pairs)
        return x.wire / (links * self.generation.link_rate)

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - one for a program
    def hops(self, pairs: Pairs) -> float:
        """Average number of hops from sender to receiver, at least 1."""
        total = 0
        for a, b in pairs:
            (_, *here), (_, *there) = self.places[a], self.places[b]
            for x, y, size, ring in zip(here, there, self.slice.shape, self.slice.wrap):
                total += min(abs(x - y), size - abs(x - y) if ring else size)
        return max(1.0, total / len(pairs))

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - one for a program
    def usable(self, groups: Groups) -> float:
        """How many links a chip of the group that has the fewest can send by.

        An axis that a group fills and that closes to a ring gives two; one that does
        not close has ends, with one. Groups that lie between each other's chips share
        the links. Two devices of a chip send what both need once.
        """
        group = max(groups, key=len)
        places = np.array([self.places[i] for i in group])[:, 1:]
        links = 0.0
        # Each axis of the torus that the group spans adds its links.
        for axis, size in enumerate(self.slice.shape):
            filled = sorted(set(places[:, axis].tolist()))
            if len(filled) < 2:
                continue
            # Members that are `apart` hops from each other share each link with as many
            # groups.
            apart = min(b - a for a, b in zip(filled, filled[1:]))
            # A ring needs an axis that wraps around and that the group fills; two chips
            # have one link between them.
            ring = self.slice.wrap[axis] and len(filled) * apart == size and size > 2
            links += (2 if ring else 1) / apart
        chips = len({tuple(place) for place in places.tolist()})
        if not links:  # the devices of one chip: their own connection is no bottleneck
            return math.inf
        shared = self.generation.devices if chips == len(group) else 1
        return links / shared


# --- groups


def replica_groups(text: str, devices: int) -> Groups:
    """The groups of devices of a collective, from any of HLO's notations."""
    pairs = _pairs(text)
    if pairs:
        return _connected(pairs)
    # HLO writes groups in three forms: by named mesh axes, as a reshaped iota, or
    # listed.
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", text)
    if named:
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", named[1]))
        names, along = list(sizes), re.findall(r"'(\w+)'", named[2])
        ids = np.arange(devices).reshape([int(n) for n in sizes.values()])
        # Group axes last, so that a reshape to (-1, size) has one group in each row.
        order = [i for i, n in enumerate(names) if n not in along]
        order += [names.index(n) for n in along]
        size = math.prod(int(sizes[n]) for n in along)
        return _tuples(ids.transpose(order).reshape(-1, size))
    iota = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    )
    if iota:
        shape, dims = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return _tuples(ids.reshape(shape))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", text)
    if listed:
        groups = re.findall(r"\{([\d,]*)\}", listed[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups if group)
    return (tuple(range(devices)),)


def _pairs(text: str) -> Pairs:
    listed = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", text)
    pairs = re.findall(r"(\d+),(\d+)", listed[1]) if listed else []
    return tuple((int(a), int(b)) for a, b in pairs)


def _tuples(ids: np.ndarray) -> Groups:
    return tuple(map(tuple, ids.tolist()))


@functools.lru_cache(maxsize=256)
def _connected(pairs: Pairs) -> Groups:
    """The connected groups of a permutation's pairs."""
    near = defaultdict(set)
    for a, b in pairs:
        near[a].add(b)
        near[b].add(a)
    groups, visited = [], set()
    for start in near:
        if start not in visited:
            group, ahead = [], [start]
            while ahead:
                x = ahead.pop()
                if x not in visited:
                    visited.add(x)
                    group.append(x)
                    ahead.extend(near[x])
            groups.append(tuple(sorted(group)))
    return tuple(groups) or ((0,),)


def _axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh's axes along which the members of a group differ."""
    largest = max(groups, key=len)
    places = np.array(np.unravel_index(largest, list(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places) if len(set(row.tolist())) > 1)
