"""Tensors in a file, plain or quantized, whose values are read when they are needed."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from sd3_jax.errors import UserError

Array = np.ndarray
SMALL = 2**16  # bytes of a text in a tensor, at most


class Tensor(NamedTuple):
    """A tensor in a file: dtype, shape and position. `read()` reads its values."""

    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def form(self) -> str:
        """What the log calls it."""
        return self.dtype.name

    def read(self) -> Array:
        x = np.empty(self.shape, self.dtype)
        with self.path.open("rb") as file:
            fill(file, self.path, self.start, x)
        return x


class EightBits(NamedTuple):
    """What int8 and e4m3 tensors hold: q of `dtype`, and one scale for each output.

    `read()` gives q (out, in) and its scale (out, 1) or (1, 1) in float32.
    """

    dtype: np.dtype
    read: Callable[[], tuple[Array, Array]]


class QuantizedTensor(NamedTuple):
    """A tensor whose `read()` gives the values that its own library computes.

    `dtype` and `shape` are those of these values, `form` is the name of the format.
    `eight` is set if the tensor has the form of our leaves (params/quantization.py).
    """

    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    form: str
    read: Callable[[], Array]
    eight: EightBits | None = None


Tensors = dict[str, Tensor | QuantizedTensor]


def fill(file, path: epath.Path, start: int, x: Array) -> None:
    """Fill x with the bytes of an open file from `start`; UserError if it ends."""
    # Straight into the array: no second copy of a large tensor.
    file.seek(start)
    # .view(np.uint8), since numpy refuses a buffer of bfloat16 or fp8.
    data = memoryview(x.reshape(-1).view(np.uint8))
    while len(data):
        count = file.readinto(data)  # a bucket may give less than asked
        if not count:
            raise UserError(f"{path}: ends within a tensor")
        data = data[count:]


def read_small(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """The values of many small tensors, with each file opened once."""
    for key, tensor in tensors.items():
        if tensor.size > SMALL:
            raise UserError(
                f"{tensor.path}: {key} has {tensor.size} bytes, expected at most"
                f" {SMALL}"
            )
    values = {}
    for path in dict.fromkeys(x.path for x in tensors.values()):
        in_file = [(k, x) for k, x in tensors.items() if x.path == path]
        with path.open("rb") as file:
            # In order of position, so that a bucket is read forwards.
            for key, tensor in sorted(in_file, key=lambda pair: pair[1].start):
                values[key] = np.empty(tensor.shape, tensor.dtype)
                fill(file, path, tensor.start, values[key])
    return values


def eight_bits(tensor: Tensor | QuantizedTensor) -> EightBits | None:
    """The tensor as q and scales, or None if it is not of eight bits."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.eight
    # A file that was cast to e4m3 has q with a scale of 1.
    if tensor.dtype.name != "float8_e4m3fn" or len(tensor.shape) != 2:
        return None
    one = np.ones((1, 1), np.float32)
    return EightBits(tensor.dtype, lambda: (tensor.read(), one))
