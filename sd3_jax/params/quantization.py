"""Weights in eight bits: which matrices, what stands for them, and how it is made.

Symmetric and by output: an output's weights are int8's whole numbers, or fp8's floats
of four bits of exponent and three of mantissa, times a scale of its own. So
x W = (x q) scale, and of W no more than q is read or held.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, ShapeDtypeStruct
from jax.sharding import NamedSharding, PartitionSpec

from sd3_jax.models.sharded_linear import Axes, linear
from sd3_jax.params import lora
from sd3_jax.params.parametrization import Leaf, LowRank

BLOCKS = "block"  # in the path of what is quantized: the blocks' matrices alone
CHUNK = 2**20  # numbers in float32 at a time, on the host


@struct.dataclass
class Quantized(Leaf):
    """q * scale, q (*inputs, *outputs) and scale (*ones, *outputs), in float32.

    In a stack of layers both have their axis in front.
    """

    q: Any
    scale: Any

    TYPE: ClassVar[Any]
    MOST: ClassVar[float]  # that an output's largest weight becomes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def sharding(self) -> Any:
        return self.q.sharding

    def array(self) -> Array:
        return self.q.astype(jnp.float32) * self.scale

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        """The scale comes after the sum: what the program reads of the weight is q."""
        y = linear(x, self.q.astype(x.dtype), axes, inputs)
        return (y * self.scale.reshape(self.shape[inputs:])).astype(x.dtype)


@struct.dataclass
class Int8(Quantized):
    TYPE = jnp.int8
    MOST = 127.0

    @staticmethod
    def rounded(x: Any) -> Any:
        xp = np if isinstance(x, np.ndarray) else jnp
        return xp.rint(x).astype(jnp.int8)


@struct.dataclass
class Float8(Quantized):
    TYPE = jnp.float8_e4m3fn
    MOST = 448.0

    @staticmethod
    def rounded(x: Any) -> Any:
        return x.astype(jnp.float8_e4m3fn)


KINDS: dict[str, type[Quantized]] = {"int8": Int8, "fp8": Float8}


def quantizable_paths(params: Any) -> set[tuple[str, ...]]:
    """Paths of the modules whose kernels are quantized: the linear maps in the blocks
    of a denoiser or a text encoder. Norms, biases, tables and what a model begins and
    ends with are not."""
    return {
        path for path in lora.kernels(params) if any(BLOCKS in name for name in path)
    }


def replaced(params: dict, make: Callable[[Any, Sequence[int]], Any]) -> dict:
    """Params with make(kernel, its input axes) for the kernels that are chosen; of a
    LowRank, for its base."""
    result = params
    for path in quantizable_paths(params):
        change = lambda x, path=path: _replace_kernel(x, path, make)
        result = lora.replaced(result, path, change)
    return result


def _replace_kernel(kernel: Any, path: tuple[str, ...], make: Callable) -> Any:
    if isinstance(kernel, LowRank):
        return dataclasses.replace(
            kernel, base=_replace_kernel(kernel.base, path, make)
        )
    axes = lora.layout(path, len(kernel.shape))
    return make(kernel, range(axes.layers, axes.layers + axes.inputs))


def quantized(params: dict, kind: str) -> dict:
    """Arrays, one after the other; to trace or compile it is the caller's."""
    return replaced(params, lambda x, axes: quantize(x, KINDS[kind], axes))


def abstract(params: dict, kind: str) -> dict:
    """Of shapes with shardings: q lies as its weight, the scale as its outputs."""
    return replaced(params, lambda x, axes: shape_of(x, KINDS[kind], axes))


def quantize(x: Array, kind: type[Quantized], axes: Sequence[int]) -> Quantized:
    """A weight whose inputs are `axes`."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), tuple(axes), keepdims=True)
    scale = jnp.where(top > 0, top * least(kind), 1.0)
    return kind(kind.rounded(x * (1 / scale)), scale)


def least(kind: type[Quantized]) -> np.float32:
    """What an output's largest is multiplied by: XLA divides unlike numpy."""
    return np.float32(1 / kind.MOST)


def shape_of(
    x: Array | ShapeDtypeStruct, kind: type[Quantized], axes: Sequence[int]
) -> Quantized:
    spec = tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    keep = lambda sizes, one: [one if i in axes else n for i, n in enumerate(sizes)]
    placed = NamedSharding(x.sharding.mesh, PartitionSpec(*keep(spec, None)))
    return kind(
        ShapeDtypeStruct(x.shape, kind.TYPE, sharding=x.sharding),
        ShapeDtypeStruct(tuple(keep(x.shape, 1)), jnp.float32, sharding=placed),
    )


def on_host(
    x: np.ndarray, kind: type[Quantized], scale_shape: Sequence[int]
) -> list[np.ndarray]:
    """[q, scale] as quantize makes them, in float32 a little at a time; the inputs are
    where `scale_shape` is 1, the first axis one of them."""
    axes = tuple(i for i, size in enumerate(scale_shape) if size == 1)
    rows = max(1, CHUNK // math.prod(x.shape[1:]))
    parts = [slice(i, i + rows) for i in range(0, len(x), rows)]
    wide = lambda part: x[part].astype(np.float32)
    top = np.zeros(scale_shape, np.float32)
    for part in parts:
        top = np.maximum(top, np.abs(wide(part)).max(axes, keepdims=True))
    scale = np.where(top > 0, top * least(kind), np.float32(1))
    q = np.empty(x.shape, kind.TYPE)
    for part in parts:
        q[part] = kind.rounded(wide(part) * (1 / scale))
    return [q, scale]


def quantize_placed(x: Array, kind: type[Quantized], axes: Sequence[int]) -> Quantized:
    """A weight on the devices in eight bits, which lie as it does."""
    shapes = shape_of(x, kind, axes)
    placed = jax.tree.map(lambda y: y.sharding, shapes)
    run = functools.partial(quantize, kind=kind, axes=tuple(axes))
    return jax.jit(run, out_shardings=placed)(x)
