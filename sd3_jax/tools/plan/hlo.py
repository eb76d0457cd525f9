"""XLA's optimised, scheduled HLO as data: computations, instructions, and shapes.

The text is read rather than the serialized proto: libtpu's messages have fields, such
as replica groups over named axes, of which no published Python schema knows, and of
programs that use the SparseCores only the dump is available.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "token": 0, "opaque": 0, "c64": 8, "c128": 16} | {
    f"{kind}{bits}": bits / 8
    for kind in ("s", "u", "f")
    for bits in (1, 2, 4, 8, 16, 32, 64)
}
HBM = 0  # the memory space of arrays that name none; S(1) is VMEM, S(5) the host
ARRAY = re.compile(r"(\w+)\[([<=\d,]*)\](\{[^}]*\})?")
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)


class Shape(NamedTuple):
    """An array's layout: sides, axes from the fastest to the slowest, sides of the
    first tile, and memory space."""

    dtype: str
    sides: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = HBM

    @property
    def elements(self) -> int:
        return math.prod(self.sides)

    @property
    def bytes(self) -> float:
        """Bytes with the padding of tiles: 96 numbers fill 128 lanes."""
        # minor_to_major: the first entry of `order` is the axis that is contiguous.
        sides = [self.sides[i] for i in self.order] or list(self.sides[::-1])
        for i, tile in enumerate(self.tile[::-1]):
            if i < len(sides):
                sides[i] = -(-sides[i] // tile) * tile
            elif self.elements:  # a vector in a tile of two dimensions
                sides.append(tile)
        return math.prod(sides) * bytes_of(self.dtype)

    @property
    def in_hbm(self) -> float:
        return self.bytes if self.space == HBM else 0.0


class Instruction(NamedTuple):
    name: str
    shapes: tuple[Shape, ...]  # of its result, a tuple's arrays one after another
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands
    root: bool = False
    elements: tuple[tuple[Shape, ...], ...] = ()  # a tuple's, one by one

    @property
    def source(self) -> str:
        """The operation of the JAX program that it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def hbm(self) -> float:
        """Bytes of its result in HBM."""
        return sum(shape.in_hbm for shape in self.shapes)

    def attribute(self, pattern: str) -> str:
        """The first group of `pattern` among the attributes; "" without a match."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> list[str]:
        """The computations that it runs, except a loop's condition."""
        pattern = (
            r"\b(?:calls|body|to_apply|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
        )
        names = ",".join(re.findall(pattern, self.attributes))
        return re.findall(r"[\w.\-]+", names)

    @property
    def branches(self) -> list[str]:
        names = self.attribute(r"\bbranch_computations=\{([^}]*)\}")
        pair = re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", self.attributes)
        return [
            name.strip().removeprefix("%") for name in names.split(",") if name
        ] or (pair)


class Computation:
    """Instructions in the order in which they are run."""

    def __init__(self, name: str):
        self.name = name
        self.instructions: list[Instruction] = []

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {x.name: x for x in self.instructions}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for x in self.instructions:
            for name in dict.fromkeys(x.operands):
                users.setdefault(name, []).append(x)
        return users

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {
            int(x.attributes): x for x in self.instructions if x.opcode == "parameter"
        }

    @property
    def root(self) -> Instruction:
        return next((x for x in self.instructions if x.root), self.instructions[-1])


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def size(self, name: str) -> int:
        """Instructions of a computation and of all that it calls."""
        called = [y for x in self[name] for y in (*x.called, *x.branches)]
        inner = (y for y in called if y in self.computations)
        return len(self[name]) + sum(map(self.size, inner))

    def reached(self, x: Instruction) -> Iterator[Computation]:
        """The computations that an instruction calls, and those which they call."""
        for name in x.called:
            if name in self.computations:
                yield self[name]
                for inner in self[name]:
                    if inner.called:
                        yield from self.reached(inner)


def parse(text: str) -> Module:
    """Parses a module's text after all passes; ValueError if it has no entry."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, []

    def close():
        if current is not None and lines:
            current.instructions.append(_instruction(" ".join(lines)))
        lines.clear()

    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        # A line "}" also ends the text of a kernel inside an instruction; only outside
        # of one it ends the computation.
        open_braces = sum(part.count("{") - part.count("}") for part in lines)
        if head:
            close()
            current = computations[head[2]] = Computation(head[2])
            entry = head[2] if head[1] else entry
        elif open_braces <= 0 and re.fullmatch(r"\}(, execution_thread=.*)?", line):
            close()
            current = None
        elif re.match(r"  (?:ROOT )?%?[\w.\-]+ = ", line):
            close()
            lines.append(line.strip())
        elif lines:  # a kernel's description may go on for several lines
            lines.append(line)
    if not entry:
        raise ValueError("the text is not an HLO module: it has no ENTRY computation")
    return Module(computations, entry)


# --- parsing one instruction


def _instruction(line: str) -> Instruction:
    root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    if rest.startswith("("):
        end = _closing(rest)
        kind, rest = rest[:end], rest[end + 1 :]
    else:
        kind, _, rest = rest.partition(" ")
    opcode, _, rest = rest.partition("(")
    end = _closing(f"({rest}") - 1
    inside, attributes = rest[: end - 1], rest[end:]
    operands = tuple(x[1:] for x in re.findall(r"%[\w.\-]+", inside))
    # Their parentheses hold a number or a value and no operands.
    if opcode in ("parameter", "constant"):
        operands, attributes = (), inside if opcode == "parameter" else f"({inside})"
    # Tuples may be nested: (operands, results) of an asynchronous start.
    parts = tuple(map(_shapes, _split(kind[1:-1]))) if kind.startswith("(") else ()
    return Instruction(
        name.removeprefix("%"), _shapes(kind), opcode, operands, attributes, root, parts
    )


def _closing(text: str) -> int:
    """Where the parenthesis that `text` begins with is closed."""
    depth = 0
    for place, letter in enumerate(text, 1):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return place
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _split(text: str) -> list[str]:
    """Splits at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if text else []


@functools.lru_cache(maxsize=2**16)
def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(_shape(*match) for match in ARRAY.findall(text))


def _shape(dtype: str, sides: str, layout: str) -> Shape:
    order, _, memory = layout.strip("{}").partition(":")
    tile = re.search(r"T\(([\d,]+)\)", memory)
    space = re.search(r"S\((\d+)\)", memory)
    return Shape(
        dtype,
        _integers(sides),
        _integers(order),
        _integers(tile[1]) if tile else (),
        int(space[1]) if space else HBM,
    )


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.replace("<=", "").split(",") if n)


def bytes_of(dtype: str) -> float:
    """Bytes of one number; KeyError for an unknown type."""
    small = {"f8": 1.0, "f4": 0.5}
    return BYTES[dtype] if dtype in BYTES else small[dtype[:2]]
