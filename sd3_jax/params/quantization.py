"""Eight-bit weights: which matrices are quantized, their leaves, and how to round.

Symmetric, one scale for each output: W = q * scale, where q is int8, or fp8 with four
bits of exponent and three of mantissa (e4m3). Then x W = (x q) * scale, and only q is
held and read. The dynamic kinds round x as well, with one scale for each token, so that
the product itself is of eight bits (LLM.int8, Dettmers et al. 2022, sec. 2.1).
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

from sd3_jax.errors import UserError
from sd3_jax.models.sharded_linear import Axes, linear
from sd3_jax.params import lora
from sd3_jax.params.parametrization import Leaf, LowRank

BLOCKS = "block"  # in the path of every quantized matrix: those of the blocks alone
CHUNK = 2**20  # float32 numbers at a time on the host, so that no full copy is made


@struct.dataclass
class Quantized(Leaf):
    """q * scale: q (*inputs, *outputs), scale (*ones, *outputs) in float32.

    In a stack of layers both have the layers' axis in front.
    """

    q: Any
    scale: Any

    TYPE: ClassVar[Any]
    MOST: ClassVar[float]  # q of an output's largest weight
    KEPT: ClassVar[tuple[str, ...]] = ()  # names in paths that this kind leaves alone

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.q.shape)

    # The dtype that the weight has for others: q's says nothing of it.
    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    @property
    def sharding(self) -> Any:
        return self.q.sharding

    def array(self) -> Array:
        return self.q.astype(jnp.float32) * self.scale

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        # Scaled after the sum over inputs: the program reads q, never a float weight.
        y = linear(x, self.q.astype(x.dtype), axes, inputs)
        return (y * self.scale.reshape(self.shape[inputs:])).astype(x.dtype)


@struct.dataclass
class Int8(Quantized):
    TYPE = jnp.int8
    MOST = 127.0  # not 128: symmetric, and -w is as exact as w

    @staticmethod
    def rounded(x: Any) -> Any:
        xp = np if isinstance(x, np.ndarray) else jnp  # numpy stays on the host
        return xp.rint(x).astype(jnp.int8)


@struct.dataclass
class Float8(Quantized):
    TYPE = jnp.float8_e4m3fn
    MOST = 448.0  # e4m3's largest finite number

    @staticmethod
    def rounded(x: Any) -> Any:
        return x.astype(jnp.float8_e4m3fn)


class Dynamic(Quantized):
    """A weight whose product rounds x too, by token, and multiplies eight bits."""

    # Modulations read one vector an image: no time to win, and all tokens depend on
    # them. "time" is the UNet's.
    KEPT = ("adaln", "time")

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        # A maximum over sharded inputs is that of all shards, so that every shard has
        # the token's scale, and sums of int8 are the same bits on any mesh.
        lead = x.ndim - inputs  # axes of batch and tokens
        rounded = quantize(x, type(self), range(lead, x.ndim))

        # Scaled in float32: bfloat16 would round the sum before it is scaled.
        def scaled(y):  # int32 or float32
            by_token = rounded.scale.reshape(*x.shape[:lead], *[1] * (y.ndim - lead))
            by_output = self.scale.reshape(y.shape[lead:])
            return (y.astype(jnp.float32) * by_token * by_output).astype(x.dtype)

        return linear(rounded.q, self.q, axes, inputs, scaled)


@struct.dataclass
class DynamicInt8(Dynamic, Int8):
    pass


@struct.dataclass
class DynamicFloat8(Dynamic, Float8):
    pass


STORED: dict[str, type[Quantized]] = {"int8": Int8, "fp8": Float8}
KINDS = STORED | {"int8_dynamic": DynamicInt8, "fp8_dynamic": DynamicFloat8}


def quantizable_paths(
    params: Any, kind: type[Quantized] = Int8
) -> set[tuple[str, ...]]:
    """Module paths of the kernels to quantize: linear maps in a model's blocks.

    Norms, biases, tables, and the first and last layers keep their precision, and so
    do the modulations of a Dynamic kind.
    """
    in_blocks = lambda path: any(BLOCKS in name for name in path)
    return {
        path
        for path in lora.kernels(params)
        if in_blocks(path) and not set(path) & set(kind.KEPT)
    }


def replaced(
    params: dict,
    kind: type[Quantized],
    make: Callable[[Any, type[Quantized], Sequence[int]], Any],
) -> dict:
    """`params` with make(kernel, kind, input axes) for each quantizable kernel.

    Of a LowRank, its base is replaced.
    """
    result = params
    for path in quantizable_paths(params, kind):
        change = lambda x, path=path: _replace_kernel(x, kind, path, make)
        result = lora.replaced(result, path, change)
    return result


def _replace_kernel(kernel: Any, kind: type[Quantized], path, make: Callable) -> Any:
    if isinstance(kernel, LowRank):
        base = _replace_kernel(kernel.base, kind, path, make)
        return dataclasses.replace(kernel, base=base)
    axes = lora.layout(path, len(kernel.shape))
    return make(kernel, kind, range(axes.layers, axes.layers + axes.inputs))


def quantized(params: dict, kind: str) -> dict:
    """`params` with leaves of the kind, a key of KINDS.

    Kernels are rounded one after the other; callers jit it or not.
    """
    return replaced(params, KINDS[kind], quantize)


def abstract(params: dict, kind: str) -> dict:
    """`quantized` for shapes: q is sharded as the weight, the scale as its outputs."""
    return replaced(params, KINDS[kind], shape_of)


def quantize(x: Array, kind: type[Quantized], axes: Sequence[int]) -> Quantized:
    """A weight as q and scale; `axes` are its input axes."""
    x = x.astype(jnp.float32)  # exact from bfloat16 and float16
    top = jnp.max(jnp.abs(x), tuple(axes), keepdims=True)
    scale = _usable(top * least(kind))
    return kind(kind.rounded(x * (1 / scale)), scale)


def _usable(scale: Any) -> Any:
    """1 for a scale whose reciprocal would overflow: all numbers round to 0 then."""
    xp = np if isinstance(scale, np.ndarray) else jnp
    # A scale of NaN stays: a NaN of x must not become a number.
    return xp.where(scale < np.finfo(np.float32).tiny, np.float32(1), scale)


def require_units(kind: str, device: Any) -> None:
    """UserError if fp8 products would be slower than bfloat16's on this device.

    int8 is on every TPU and GPU here. A CPU computes both, for tests.
    """
    if not kind.startswith("fp8_") or device.platform == "cpu":
        return
    if device.platform == "tpu":
        has_fp8 = device.device_kind.startswith("TPU7")
    else:  # Ada is 8.9, Hopper 9.0; AMD's architectures are words, such as "gfx942"
        version = str(getattr(device, "compute_capability", ""))
        has_fp8 = version[:1].isdigit() and float(version) >= 8.9
    if not has_fp8:
        raise UserError(
            f'quantize denoiser "{kind}": {device.device_kind} has no fp8 products;'
            ' expected "int8_dynamic", or "fp8" for storage alone'
        )


def least(kind: type[Quantized]) -> np.float32:
    """1 / MOST, the scale of an output whose largest weight is 1."""
    # A factor, not a division by MOST: XLA divides unlike numpy, and device and host
    # must round to the same bits.
    return np.float32(1 / kind.MOST)


def shape_of(
    x: Array | ShapeDtypeStruct, kind: type[Quantized], axes: Sequence[int]
) -> Quantized:
    """Shapes of q and scale for a weight with a sharding; `axes` are its inputs."""
    # A PartitionSpec may be shorter than the shape.
    spec = tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))
    keep = lambda sizes, one: [one if i in axes else n for i, n in enumerate(sizes)]
    # Input axes have size 1 in the scale, so they cannot be sharded.
    placed = NamedSharding(x.sharding.mesh, PartitionSpec(*keep(spec, None)))
    return kind(
        ShapeDtypeStruct(x.shape, kind.TYPE, sharding=x.sharding),
        ShapeDtypeStruct(tuple(keep(x.shape, 1)), jnp.float32, sharding=placed),
    )


def on_host(
    x: np.ndarray, kind: type[Quantized], scale_shape: Sequence[int]
) -> list[np.ndarray]:
    """[q, scale] with the bits that `quantize` gives, computed in numpy.

    Input axes are those where `scale_shape` is 1; the first axis must be one. Chunks of
    CHUNK numbers are float32 at a time, not the whole weight.
    """
    axes = tuple(i for i, size in enumerate(scale_shape) if size == 1)
    rows = max(1, CHUNK // math.prod(x.shape[1:]))
    parts = [slice(i, i + rows) for i in range(0, len(x), rows)]
    wide = lambda part: x[part].astype(np.float32)
    # Two passes, since the scale must be known before anything is rounded.
    top = np.zeros(scale_shape, np.float32)
    for part in parts:
        top = np.maximum(top, np.abs(wide(part)).max(axes, keepdims=True))
    scale = _usable(top * least(kind))
    q = np.empty(x.shape, kind.TYPE)
    for part in parts:
        q[part] = kind.rounded(wide(part) * (1 / scale))
    return [q, scale]


def quantize_placed(x: Array, kind: type[Quantized], axes: Sequence[int]) -> Quantized:
    """`quantize` on the devices, with q in the weight's sharding."""
    shapes = shape_of(x, kind, axes)
    placed = jax.tree.map(lambda y: y.sharding, shapes)
    run = functools.partial(quantize, kind=kind, axes=tuple(axes))
    return jax.jit(run, out_shardings=placed)(x)
