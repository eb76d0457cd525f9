"""The collectives of a compiled program: bytes on the wire, by kind and mesh axis.

Read off the text of XLA's optimised HLO: every collective once for each turn of the
loops around it. Bytes are what a chip sends in a ring of its group.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "ragged-all-to-all"),
)
SIZES = {"pred": 1, "bf16": 2, "f16": 2} | {
    f"{kind}{bits}": bits / 8
    for kind in ("s", "u", "f")
    for bits in (2, 4, 8, 16, 32, 64)
}
VIEWS = {  # they move nothing, or what they move is counted where it happens
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "opt-barrier", "domain"),
    "async-update",  # and whatever ends in -done
}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
CALLS = re.compile(r"\b(?:calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Collective(NamedTuple):
    """`count` executions a step of `wire` bytes each, sent by one device."""

    kind: str
    axes: tuple[str, ...]  # of the mesh, along which its groups lie
    wire: float
    count: int
    shape: str
    source: str  # the operation of the program it was made for
    asynchronous: bool

    @property
    def total(self) -> float:
        return self.wire * self.count


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """`mesh` are the axes' sizes, in the order of the devices."""
    found = computations(text)
    counts = executions(found)
    started = {
        name
        for code in found.values()
        for x in code
        if x.opcode == "async-start"
        for name in _within(x, found)
    }
    seen: dict[str, Collective] = {}
    for name, instructions in found.items():
        for x in instructions:
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS or not counts[name]:
                continue
            # XLA's fused form: an all-reduce of which each device keeps its part.
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            made = _collective(kind, x, mesh, counts[name], name)
            if name in started:  # on a SparseCore
                made = made._replace(asynchronous=True)
            channel = re.search(r"channel_id=(\d+)", x.rest)
            told = channel and channel[1] != "1"  # all of shard_map's have this one
            key = channel[1] if told else f"{name}/{x.name}"
            # One that runs beside several matrix products, some of them in loops of
            # their own, has an entry in each; it starts once.
            if key in seen:
                least = min(made, seen[key], key=lambda x: x.total)
                beside = made.asynchronous or seen[key].asynchronous
                made = least._replace(asynchronous=beside)
            seen[key] = made
    return list(seen.values())


def computations(text: str) -> dict[str, list[Instruction]]:
    """By name; the entry's is ""."""
    found, current = {}, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            current = found.setdefault("" if head[1] else head[2], [])
        elif line == "}":  # a kernel's own description may begin a line so
            current = None
        elif current is not None and " = " in line:
            current.append(_instruction(line))
    return found


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        depth = 0
        for end, letter in enumerate(rest, 1):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                kind, rest = rest[:end], rest[end + 1 :]
                break
    else:
        kind, _, rest = rest.partition(" ")
    opcode, _, rest = rest.partition("(")
    return Instruction(name.removeprefix("%"), kind, opcode, rest)


def traffic(text: str) -> float:
    """Bytes that a step reads and writes in HBM: of every operation outside fusions its
    operands and what it makes, and of slices only what is taken or put."""
    found = computations(text)
    counts = executions(found, fused=False)
    return sum(
        counts[name] * sum(_moved(code, found))
        for name, code in found.items()
        if counts[name]
    )


def _moved(code: list[Instruction], found) -> Iterator[float]:
    made = {x.name: x.type for x in code}
    for x in code:
        if x.opcode in VIEWS or x.opcode.endswith("-done"):
            continue
        given = [made.get(name, "") for name in _operands(x)]
        if x.opcode.endswith("-start"):  # of a copy or slice: (operand, result, …)
            result = sum(_in_hbm(a) for a in ARRAY.findall(x.type)[1:2])
            yield result + min(result, _hbm(given))
        elif x.opcode == "dynamic-slice":
            yield 2 * _hbm([x.type])
        elif x.opcode == "dynamic-update-slice":
            yield 2 * _hbm(given[1:2])
        elif x.opcode == "fusion":
            inside = found.get(CALLS.findall(x.rest)[0], [])
            yield _by_fusion(x, inside, given)
        else:
            yield _hbm([x.type]) + _hbm(given)


def _by_fusion(x: Instruction, inside: list[Instruction], given: list[str]) -> float:
    """A slice of an operand is all that is read of it, and one put in its place all
    that is written."""
    total, put = 0.0, 0.0
    types = {y.name: y.type for y in inside}
    users = defaultdict(list)
    for y in inside:
        for name in _operands(y):
            users[name].append(y)
    for y in inside:
        if y.opcode == "parameter":
            place = int(y.rest.partition(")")[0])
            read = _hbm(given[place : place + 1])
            reached = _through(users[y.name], users)
            if reached and all(u.opcode == "dynamic-slice" for u in reached):
                read = min(read, sum(_hbm([u.type], any_space=True) for u in reached))
            elif any(u.opcode == "dynamic-update-slice" for u in reached):
                updates = [_operands(u)[1] for u in reached if "update" in u.opcode]
                size = _hbm([types.get(n, "") for n in updates], any_space=True)
                read, put = 0.0, put + max(_hbm([x.type]) and read - size, 0.0)
            total += read
    return total + max(_hbm([x.type]) - put, 0.0)


def _through(found: list[Instruction], users) -> list[Instruction]:
    """Past bitcasts."""
    return [
        z
        for y in found
        for z in (_through(users[y.name], users) if y.opcode == "bitcast" else [y])
    ]


def _hbm(types: list[str], *, any_space: bool = False) -> float:
    arrays = [a for t in types for a in ARRAY.findall(t)]
    return sum(_bytes(*a[:2]) if any_space else _in_hbm(a) for a in arrays)


def _in_hbm(array: tuple[str, str, str]) -> float:
    kind, sides, layout = array
    return 0.0 if re.search(r"S\([1-9]", layout) else _bytes(kind, sides)


def executions(
    found: Mapping[str, list[Instruction]], *, fused: bool = True
) -> Counter:
    """How often a step runs each computation, without `fused` those in memory only."""
    calls = {name: list(_calls(found, code, fused)) for name, code in found.items()}
    counts: Counter = Counter({"": 1})
    order, done = [], set()

    def visit(name):  # callers before those they call
        if name in done:
            return
        done.add(name)
        for callee, _ in calls.get(name, ()):
            visit(callee)
        order.append(name)

    visit("")
    for name in reversed(order):
        for callee, times in calls.get(name, ()):
            counts[callee] += counts[name] * times
    return counts


def _calls(found, code, fused: bool) -> Iterator[tuple[str, int]]:
    for x in code:
        if x.opcode == "while":
            body = re.search(r"body=%?([\w.\-]+)", x.rest)[1]
            yield body, trips(x, found)
        elif x.opcode == "call" or (
            fused and x.opcode in ("fusion", "async-start", "custom-call")
        ):
            for callee in CALLS.findall(x.rest):
                if callee in found:
                    yield callee, 1
        elif x.opcode == "conditional":
            names = BRANCHES.search(x.rest)[1].split(",")
            names = [name.strip().removeprefix("%") for name in names]
            # One is run. Ours have a short one, for what hardly ever happens.
            yield max(names, key=lambda name: len(found.get(name, ()))), 1


def trips(loop: Instruction, found: Mapping[str, list[Instruction]]) -> int:
    """A loop's turns: as XLA tells them, or the bound of its condition over what each
    turn adds to the counter; rings inside matrix products count by twos."""
    told = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
    if told:
        return int(told[1])
    condition = found[re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]]
    body = found[re.search(r"body=%?([\w.\-]+)", loop.rest)[1]]
    root = next((x for x in condition if x.opcode == "compare"), None)
    if root is None:  # it is in a fusion: the only number there is the bound
        inner = [_numbers(found.get(name, [])) for name in _callees(condition)]
        bounds = [
            *_numbers(condition).values(),
            *(n for x in inner for n in x.values()),
        ]
        return max(bounds, default=1)
    numbers = _numbers(condition)
    bound = max(
        (numbers[name] for name in _operands(root) if name in numbers), default=1
    )
    counters = {x.name: x for x in condition if x.opcode == "get-tuple-element"}
    counter = next((counters[n] for n in _operands(root) if n in counters), None)
    if counter is None:
        return bound
    place = int(re.search(r"index=(\d+)", counter.rest)[1])
    by_name = {x.name: x for x in body}
    moved = by_name.get(_operands(body[-1])[place])
    steps = _numbers(body)
    added = [] if moved is None or moved.opcode != "add" else _operands(moved)
    return math.ceil(bound / next((steps[n] for n in added if n in steps), 1))


def _within(x: Instruction, found) -> Iterator[str]:
    """The computations that an operation calls, and those which they call."""
    for name in CALLS.findall(x.rest):
        yield name
        for inner in found.get(name, ()):
            yield from _within(inner, found)


def _numbers(code: list[Instruction]) -> dict[str, int]:
    return {
        x.name: int(number[1])
        for x in code
        if x.opcode == "constant" and (number := re.match(r"(\d+)\)", x.rest))
    }


def _operands(x: Instruction) -> list[str]:
    inside = x.rest.partition(")")[0]
    return [name.removeprefix("%") for name in re.findall(r"%[\w.\-]+", inside)]


def _callees(code: list[Instruction]) -> list[str]:
    return [name for x in code for name in CALLS.findall(x.rest)]


def _collective(kind, x: Instruction, mesh, count, place) -> Collective:
    groups = _groups(x.rest, math.prod(mesh.values()))
    size = len(groups[0])
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", x.type)
    held = [_bytes(*shape) for shape in shapes]
    whole = max(held, default=0)
    if kind in ("all-reduce", "reduce-scatter") and x.type.startswith("("):
        whole = sum(held) / (2 if x.opcode.endswith("-start") else 1)
    ring = (size - 1) / size
    if kind == "all-reduce":
        wire = 2 * whole * ring
    elif kind == "reduce-scatter":
        parts = 1 if x.opcode.startswith("all-reduce") else size  # its type is one part
        wire = whole * ring * parts
    elif kind == "collective-permute":
        wire = whole
    else:
        wire = whole * ring
    source = re.search(r'op_name="([^"]*)"', x.rest)
    fused = "async" in place or "windowed" in place
    shape = max(shapes, key=lambda s: _bytes(*s), default=("", ""))
    return Collective(
        kind,
        _axes(groups, mesh),
        wire,
        count,
        f"{shape[0]}[{shape[1]}]",
        source[1] if source else "",
        x.opcode.endswith("-start") or fused,
    )


def _bytes(dtype: str, sides: str) -> float:
    size = next((n for name, n in SIZES.items() if dtype == name), None)
    size = 1 if size is None and dtype.startswith("f8") else size or 0
    return size * math.prod(int(side) for side in sides.split(",") if side)


def _groups(rest: str, devices: int) -> list[list[int]]:
    """Which devices talk to which, in any of the ways that HLO tells it."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", rest)
    if pairs:
        return _connected(re.findall(r"(\d+),(\d+)", pairs[1]))
    told = re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{]*)\{([^}]*)\}", rest)
    if told:
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", told[1]))
        names, along = list(sizes), re.findall(r"'(\w+)'", told[2])
        ids = np.arange(devices).reshape([int(n) for n in sizes.values()])
        order = [i for i, n in enumerate(names) if n not in along]
        order += [names.index(n) for n in along]
        size = math.prod(int(sizes[n]) for n in along)
        return ids.transpose(order).reshape(-1, size).tolist()
    told = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    )
    if told:
        shape, dims = ([int(n) for n in told[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if told[3]:
            ids = ids.transpose([int(n) for n in told[3].split(",")])
        return ids.reshape(shape).tolist()
    told = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest)
    if told:
        groups = re.findall(r"\{([\d,]*)\}", told[1])
        return [[int(n) for n in group.split(",")] for group in groups if group]
    return [list(range(devices))]


def _connected(pairs) -> list[list[int]]:
    """Rings from their hops."""
    near = defaultdict(set)
    for a, b in pairs:
        near[int(a)].add(int(b))
        near[int(b)].add(int(a))
    groups, seen = [], set()
    for start in near:
        if start not in seen:
            group, ahead = [], [start]
            while ahead:
                x = ahead.pop()
                if x not in seen:
                    seen.add(x)
                    group.append(x)
                    ahead.extend(near[x])
            groups.append(sorted(group))
    return groups or [[0]]


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh's axes along which the members of a group differ."""
    places = np.array(np.unravel_index(groups[0], list(mesh.values())))
    return tuple(axis for axis, row in zip(mesh, places) if len(set(row.tolist())) > 1)
