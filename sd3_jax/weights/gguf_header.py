"""Parse the header of a GGUF file: its fields, and where its tensors are.

The format is that of ggml's docs/gguf.md, versions 2 and 3. The gguf package maps whole
local files; this parser reads the header alone, at any path of epath, and checks it.
"""

import math
import struct
from typing import Any, BinaryIO, NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

MAGIC = b"GGUF"
# Version 1 had 32-bit counts, and no file of SD3 is that old.
VERSIONS = (2, 3)
# Bounds that a damaged or hostile file would break: each count is followed by an
# allocation.
NAME, AXES = 512, 8  # characters of a name, axes of a tensor, at most
TEXT = 2**24  # bytes of a text, at most: a chat template has 10,000
MANY = 2**17  # tensors or fields, at most; models have 2,000
ARRAY = 64  # values of an array that is kept; tokenizers, which are longer, are not
ALIGNMENT = 32  # bytes, where general.alignment does not say
STRING, LIST = 8, 9
CUT = "it ends within its header: copy it again"
SCALARS = {  # types of values, by their number in the file: struct's letters
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}


class Entry(NamedTuple):
    """A tensor: sizes as in numpy (the last axis is contiguous), type, first byte."""

    sizes: tuple[int, ...]
    type: int
    start: int  # bytes from the start of the file


class Header(NamedTuple):
    """Fields by name, without long arrays, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, Entry]
    length: int  # bytes of the file


def is_gguf(path: epath.Path) -> bool:
    """Whether a file begins with GGUF's magic number."""
    files.require_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_header(path: epath.Path) -> Header:
    """The header of a file; UserError if it is damaged or cut off."""
    length = files.size(path)
    try:
        with path.open("rb") as file:
            return _parse(_Bytes(file, length))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a GGUF file, or damaged: {error}") from None


class _Bytes:
    """A file's bytes in order; ValueError at its end."""

    def __init__(self, file: BinaryIO, length: int):
        self.file, self.left, self.length = file, length, length

    def take(self, count: int) -> bytes:
        self._pass(count)
        data = self.file.read(count)
        if len(data) != count:  # the file became shorter
            raise ValueError(CUT)
        return data

    def skip(self, count: int) -> None:
        self._pass(count)
        self.file.seek(count, 1)

    def _pass(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(CUT)

    def number(self, letter: str) -> Any:
        form = f"<{letter}"
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, most: int, kind: str) -> int:
        count = self.number("Q")
        if count > most:
            raise ValueError(f"{count} {kind}, expected {most} at most")
        return count

    def text(self) -> str:
        return self.take(self.count(TEXT, "bytes of a text")).decode(errors="replace")

    @property
    def position(self) -> int:
        return self.length - self.left


def _parse(data: _Bytes) -> Header:
    data.take(4)
    version = data.number("I")
    if version not in VERSIONS:
        # A big-endian file has the version's bytes reversed, and all else too.
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        order = " in big-endian order" if swapped in VERSIONS else ""
        number = swapped if order else version
        raise ValueError(f"version {number}{order}, expected {VERSIONS}, little-endian")
    tensor_count = data.count(MANY, "tensors")
    field_count = data.count(MANY, "fields")
    # --- fields: name, type, value
    fields = {}
    for _ in range(field_count):
        name = data.text()
        fields[name] = _value(data, data.number("I"))
    alignment = fields.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 2**20:
        raise ValueError(f"general.alignment {shown(alignment)}")
    # --- tensors: name, sizes from the contiguous axis on, type, offset in the data
    tensors = {}
    for _ in range(tensor_count):
        name = data.text()
        if len(name) > NAME or not name.isprintable():
            raise ValueError(f'"{shown(name)}": expected a printable name of {NAME}')
        if name in tensors:
            raise ValueError(f"{name} appears twice")
        axes = data.number("I")
        if axes > AXES:
            raise ValueError(f"{name}: {axes} axes, expected {AXES} at most")
        # ggml lists the contiguous axis first, numpy last.
        sizes = tuple(data.number("Q") for _ in range(axes))[::-1]
        # Below 2**63 even at 16 bytes a number, so that offsets are int64.
        if math.prod(max(n, 1) for n in sizes) >= 2**59:
            raise ValueError(f"{name}: shape {shown(list(sizes))}")
        # The offset counts from the start of the data, which is known after the last
        # tensor.
        tensors[name] = Entry(sizes, data.number("I"), data.number("Q"))
    # --- the data begin at the next multiple of the alignment
    base = -(-data.position // alignment) * alignment
    placed = {k: x._replace(start=base + x.start) for k, x in tensors.items()}
    return Header(fields, placed, data.length)


def _value(data: _Bytes, kind: int) -> Any:
    """A field's value; None for an array of more than ARRAY values."""
    if kind == STRING:
        return data.text()
    if kind in SCALARS:
        return data.number(SCALARS[kind])
    if kind != LIST:
        raise ValueError(f"a field of type {kind}")
    inner, count = data.number("I"), data.number("Q")
    if inner in SCALARS:
        letter = SCALARS[inner]
        if count > ARRAY:
            data.skip(count * struct.calcsize(letter))
            return None
        return [data.number(letter) for _ in range(count)]
    # Arrays of arrays, which the format allows; no known writer makes them.
    if inner != STRING:
        raise ValueError(f"an array of type {inner}")
    for _ in range(count):  # a tokenizer's words: their lengths alone are read
        data.skip(data.count(TEXT, "bytes of a text"))
    return None
