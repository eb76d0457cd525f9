"""Costs of one operation of a compiled program: FLOPs, and bytes of HBM.

Bytes include tile padding. A fusion reads the part of an operand that its slices take
and writes the new part of an in-place update; passing an array through is free. XLA
counts nothing for Pallas kernels, so they are recognised by name.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from sd3_jax.tools.plan import matmul_costs
from sd3_jax.tools.plan.hlo import (
    COLLECTIVES,
    Computation,
    Instruction,
    Module,
    Shape,
)
from sd3_jax.tools.plan.slices import Generation

FREE = {  # they move nothing, or what they move is counted where it happens
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "opt-barrier", "domain"),
    *("replica-id", "add-dependency", "async-update"),
}
UNCOUNTED_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollective")
COPIES = {
    *("copy", "transpose", "reshape", "pad", "slice", "concatenate", "reverse"),
    *("broadcast", "iota", "dynamic-slice", "dynamic-update-slice", "gather"),
}
SLICES = ("slice", "dynamic-slice", "gather")
HOST = 5  # the memory space
VIEWS = ("bitcast", "get-tuple-element", "opt-barrier", "copy-done", "async-done")
# In a fusion these read of their operand as much as their user takes.
PASSED_ON = (*VIEWS, "copy", "convert", "reshape", "pad")


class Cost(NamedTuple):
    """Of one execution on one device."""

    flops: float = 0.0
    read: float = 0.0  # bytes of HBM
    written: float = 0.0
    host: float = 0.0  # bytes to or from the host's memory
    narrow: float = 1.0  # the share of the matrix unit that its products fill
    kind: str = ""  # "matmul", "attention", "elementwise", "copy"; "" costs nothing
    eight_bits: Mapping[str, float] = MappingProxyType({})  # of flops, by HLO's dtype

    @property
    def bytes(self) -> float:
        return self.read + self.written

    def compute_seconds(self, chip: Generation) -> float:
        """Of the products alone, at the peaks of their dtypes."""
        seconds = (self.flops - sum(self.eight_bits.values())) / chip.peak
        for dtype, flops in self.eight_bits.items():
            seconds += flops / chip.eight_bits(dtype)
        return seconds / self.narrow


def is_start(x: Instruction) -> bool:
    return x.opcode.endswith("-start") or x.opcode in ("send", "recv")


def is_done(x: Instruction) -> bool:
    return x.opcode.endswith("-done")


def cost(x: Instruction, home: Computation, module: Module, matrix: int) -> Cost:
    """Of `x`, an instruction of `home`; `matrix` is the matrix unit's width.

    An asynchronous operation is charged at its start. Loops and branches are free; the
    operations in them are not.
    """
    if x.opcode in FREE or is_done(x):
        return Cost()
    if x.opcode == "custom-call":
        return _custom_call(x, home, module, matrix)
    collective = x.opcode.removesuffix("-start") in COLLECTIVES
    if (x.opcode == "fusion" or is_start(x)) and x.called and not collective:
        # A fusion's intermediate results stay in registers or VMEM: only operands and
        # results touch HBM.
        body = module[x.called[0]]
        operands = _given(x, home)
        read = sum(
            consumed(body, place, module, _whole(home, name))
            for place, name in enumerate(operands)
        )
        flops = matmul_costs.products(body, module)
        written = produced(body, module)
        if not flops:
            return Cost(0.0, read, written, kind=_kind_of(body, module))
        return _products(flops, read, written)
    if is_start(x):
        result = done_of(x, home)
        written = result.hbm if result else 0.0
        read = sum(_whole(home, name) for name in x.operands)
        # An asynchronous slice reads no more than it returns.
        if x.opcode.startswith(SLICES) and result:
            read = min(read, sum(shape.bytes for shape in result.shapes))
        return Cost(0.0, read, written, host=_host(x, home), kind="copy")
    # A slice reads what it returns, not its whole operand.
    if x.opcode in SLICES:
        taken = sum(shape.bytes for shape in x.shapes)
        return Cost(0.0, min(taken, _whole(home, x.operands[0])), x.hbm, kind="copy")
    # Outside of fusions XLA updates in place: the rest of the array is not moved.
    if x.opcode == "dynamic-update-slice":
        update = home.by_name[x.operands[1]]
        size = update.hbm if x.hbm else 0.0
        return Cost(0.0, update.hbm, size, kind="copy")
    read = sum(_whole(home, name) for name in x.operands)
    kind = "copy" if x.opcode in COPIES else "elementwise"
    if x.opcode in ("convolution", "dot"):
        flops = {matmul_costs.rate(x, home): matmul_costs.product(x, home)}
        return _products(flops, read, x.hbm)
    return Cost(0.0, read, x.hbm, kind=kind)


def _products(flops: Mapping[str, float], read: float, written: float) -> Cost:
    eight_bits = {dtype: x for dtype, x in flops.items() if dtype}
    total = sum(flops.values())
    return Cost(total, read, written, kind="matmul", eight_bits=eight_bits)


def done_of(x: Instruction, home: Computation) -> Instruction | None:
    """The end of an asynchronous operation; None if it ends in another computation."""
    for user in home.users.get(x.name, ()):
        if is_done(user):
            return user
        if user.opcode.endswith("-update"):
            return done_of(user, home)
    return None


def _host(x: Instruction, home: Computation) -> float:
    """Bytes that an asynchronous copy moves to or from the host's memory."""
    result = done_of(x, home)
    moved = [home.by_name[name] for name in x.operands if name in home.by_name]
    sizes = [
        sum(shape.bytes for shape in y.shapes if shape.space == HOST)
        for y in (*moved, *([result] if result else []))
    ]
    return max(sizes, default=0.0)


def _given(x: Instruction, home: Computation) -> tuple[str, ...]:
    """Operands; on a SparseCore they belong to an update after the start."""
    updates = [u for u in home.users.get(x.name, ()) if u.opcode == "async-update"]
    return x.operands or tuple(n for u in updates for n in u.operands[1:])


def _whole(home: Computation, name: str) -> float:
    return home.by_name[name].hbm if name in home.by_name else 0.0


# --- fusions: what they read


def consumed(body: Computation, place: int, module: Module, whole: float) -> float:
    """Bytes that a fusion reads of its operand number `place`, of `whole` in HBM."""
    if not whole or place not in body.parameters:
        return 0.0
    return min(whole, sum(_reads(body, body.parameters[place], module, whole)))


def _reads(body, x: Instruction, module: Module, whole: float) -> Iterator[float]:
    for user in body.users.get(x.name, ()):
        if _passes_on(user, module):
            yield whole if user.root else 0.0
            yield from _reads(body, user, module, whole)
        elif user.opcode in SLICES and user.operands[0] == x.name:
            yield sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
            yield 0.0 if _in_place(body, user, module) else whole
        elif user.opcode == "fusion" or user.opcode == "call":
            inner = module[user.called[0]]
            for place, name in enumerate(user.operands):
                if name == x.name:
                    yield consumed(inner, place, module, whole)
        elif user.opcode == "tuple" or _counted_elsewhere(user):
            yield 0.0  # passed on, or a collective's that has begun before
        else:
            yield whole


def _passes_on(x: Instruction, module: Module) -> bool:
    """Whether it passes its operand on and reads only what its user takes."""
    if x.opcode != "fusion":
        return x.opcode in PASSED_ON
    return all(y.opcode in (*PASSED_ON, "parameter") for y in module[x.called[0]])


def _counted_elsewhere(x: Instruction) -> bool:
    """Collectives inside fusions are counted once by channel (link_traffic.py)."""
    passing = x.opcode == "custom-call" and "AsyncCollective" in x.attributes
    return passing or (x.opcode in COLLECTIVES and "chain_id" in x.attributes)


# --- fusions: what they write


def produced(body: Computation, module: Module) -> float:
    """Bytes that a fusion writes to HBM."""
    root = body.root
    if root.opcode != "tuple":
        return _writes(body, root, module, root.shapes)
    return sum(
        _writes(body, body.by_name[name], module, shapes)
        for name, shapes in zip(root.operands, root.elements)
    )


def _writes(body, x: Instruction, module: Module, where: tuple[Shape, ...]) -> float:
    size = sum(shape.in_hbm for shape in where)
    if not size or x.opcode == "parameter" or _counted_elsewhere(x):
        return 0.0
    if x.opcode in VIEWS:
        return _writes(body, body.by_name[x.operands[0]], module, where)
    if x.opcode == "dynamic-update-slice" and _in_place(body, x, module):
        return min(size, sum(s.bytes for s in body.by_name[x.operands[1]].shapes))
    if x.opcode == "fusion":
        inner = module[x.called[0]]
        if inner.root.opcode != "tuple":
            return min(size, _writes(inner, inner.root, module, where))
    return size


def _in_place(body: Computation, update: Instruction, module: Module) -> bool:
    """Whether the updated array is an operand of the fusion."""
    # Bitcasts and the like lie between the operand and its update.
    target = body.by_name[update.operands[0]]
    while target.operands and target.opcode != "pad" and _passes_on(target, module):
        target = body.by_name[target.operands[0]]
    if target.opcode == "dynamic-update-slice":
        return _in_place(body, target, module)
    return target.opcode == "parameter"


def _kind_of(body: Computation, module: Module) -> str:
    """ "copy" if a computation only moves numbers, "elementwise" if it makes some."""
    for x in body:
        if x.opcode == "fusion":
            if _kind_of(module[x.called[0]], module) == "elementwise":
                return "elementwise"
        elif x.opcode not in COPIES | FREE:
            return "elementwise"
    return "copy"


# Kernels


def _custom_call(x, home: Computation, module: Module, matrix: int) -> Cost:
    target = x.attribute(r'custom_call_target="([^"]*)"')
    if target.startswith(UNCOUNTED_CALLS):
        return Cost()
    read = sum(_whole(home, name) for name in x.operands)
    if "splash" in x.name:
        flops, head = matmul_costs.splash(x, home)
        filled = min(1.0, head / matrix)
        return Cost(flops, read, x.hbm, narrow=filled, kind="attention")
    return Cost(0.0, read, x.hbm, kind="elementwise")
