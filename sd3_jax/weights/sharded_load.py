"""Load a file's tensors straight into their shardings, and export leaves to tensors.

A process holds its own shards, READERS tensors of the file, and one leaf's shards while
they move to a device with memory of its own. Eight-bit leaves are rounded a tensor at a
time, so no full-precision copy of them exists.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sd3_jax import tree
from sd3_jax.data.float_bits import finite
from sd3_jax.errors import UserError
from sd3_jax.params import parametrization, quantization
from sd3_jax.params.quantization import Quantized
from sd3_jax.weights import key_mapping
from sd3_jax.weights.key_mapping import Piece
from sd3_jax.weights.safetensors import Entry
from sd3_jax.weights.stored_tensor import Tensors, eight_bits

READERS = 4  # threads, a tensor each; numpy reads, turns and casts without the GIL
ALIGNMENT = 64  # bytes; XLA's CPU devices copy host memory that is less aligned


def check(
    tensors: Mapping[str, Any],
    pieces: Sequence[Piece],
    *,
    where: str,
    ignored: Sequence[str] = (),
) -> None:
    """UserError unless the file has exactly the tensors of `pieces`, in their shapes.

    `where` begins the message, which lists what differs. Names that end in one of
    `ignored` may be there. Tensors of integers are refused.
    """
    # --- dtypes first: packed integers have other shapes too
    needed = {p.key for p in pieces if p.key is not None}
    integers = [
        k for k, x in tensors.items() if k in needed and np.dtype(x.dtype).kind in "biu"
    ]
    if integers:
        name = integers[0]
        raise UserError(
            f"{where}: {name} is of {np.dtype(tensors[name].dtype)}, expected floats;"
            f" the file is quantized ({len(integers)} tensors of integers), and their"
            " scales are missing"
        )
    # --- names and shapes
    wanted = {p.key: list(p.file_shape) for p in pieces if p.key is not None}
    present = {
        key: list(x.shape)
        for key, x in tensors.items()
        if key in wanted or not key.endswith(tuple(ignored))
    }
    if faults := tree.mismatch(wanted, present, "shape"):
        raise UserError(f"{where}: {faults}")


def load(tensors: Tensors, abstract: Any, pieces: Sequence[Piece]) -> Any:
    """The tree that `abstract` describes by shapes with dtypes and shardings.

    Leaves of `abstract` may be Int8 or Float8 of shapes (params/quantization.py).
    """
    # groupby needs no sort: key_mapping.pieces goes leaf by leaf.
    by_leaf = {k: list(p) for k, p in groupby(pieces, key=lambda piece: piece.path)}

    def leaf(path, x):
        return _load_leaf(tensors, x, by_leaf[tree.names(path)])

    return jax.tree_util.tree_map_with_path(
        leaf, abstract, is_leaf=parametrization.is_leaf
    )


def _load_leaf(tensors, leaf, pieces) -> Any:
    wanted, treedef = jax.tree.flatten(leaf)  # one shape, or those of q and scale
    filling = [_Shards(x) for x in wanted]

    def bring(piece):
        if not any(x.has(piece.index) for x in filling):
            return  # layers of other processes: their bytes are not read here
        for x, values in zip(filling, _parts(tensors, leaf, piece)):
            x.fill(piece.index, values)

    with ThreadPoolExecutor(READERS) as pool:
        # Threads need no lock: each piece fills its own part. list() raises errors.
        list(pool.map(bring, pieces))
    return jax.tree.unflatten(treedef, [x.array() for x in filling])


def _parts(tensors, leaf, piece) -> list[np.ndarray]:
    """[values] of a piece, or [q, scale] for an eight-bit leaf."""
    if not isinstance(leaf, Quantized):
        return [_values(tensors, piece)]
    # Scales are by output, so a piece (a layer, or q of qkv) is rounded by itself.
    shape = key_mapping.indexed(leaf.scale.shape, piece.index)
    if not keeps(tensors, leaf, piece):
        return quantization.on_host(_values(tensors, piece), type(leaf), shape)
    q, scale = eight_bits(tensors[piece.key]).read()
    if not finite(q) or not finite(scale):
        raise _not_finite(tensors, piece)
    # The table turns and splits a matrix: so it does with the scale of each number, of
    # which one for each output is left.
    by_number = piece.read(np.broadcast_to(scale, q.shape))
    first = tuple(slice(1) if size == 1 else slice(None) for size in shape)
    return [piece.read(q), by_number[first]]


def keeps(tensors: Tensors, leaf: Any, piece: Piece) -> bool:
    """Whether an eight-bit leaf takes the file's own q and scales, without rounding."""
    if not isinstance(leaf, Quantized) or piece.key is None:
        return False
    eight = eight_bits(tensors[piece.key])
    return eight is not None and eight.dtype == np.dtype(leaf.TYPE)


def _values(tensors, piece) -> np.ndarray:
    return piece.fill() if piece.key is None else piece.read(_read(tensors, piece))


class _Shards:
    """An array's shards on this process's devices, filled in host memory.

    Replicas share a buffer: buffers are by bounds, not by device.
    """

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf, sharding = leaf, leaf.sharding
        places = sharding.addressable_devices_indices_map(leaf.shape)
        self.bounds = {  # (start, stop) of each axis, by device
            device: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
            for device, index in places.items()
        }
        self.buffers = {  # by bounds
            bound: _aligned([stop - start for start, stop in bound], leaf.dtype)
            for bound in self.bounds.values()
        }

    def has(self, index: tuple) -> bool:
        """Whether a part of leaf[index] is on this process's devices."""
        return any(_overlap(index, bound) for bound in self.buffers)

    def fill(self, index: tuple, part: np.ndarray) -> None:
        """Copy the values of leaf[index] into every shard that overlaps it."""
        for bound, buffer in self.buffers.items():
            if selection := _overlap(index, bound):
                target, source = selection
                buffer[target] = _cast(part[source], buffer.dtype)

    def array(self) -> jax.Array:
        """The array on the devices; a buffer is freed when its shards are there."""
        shards, bounds = [], self.bounds
        kind = self.leaf.sharding.memory_kind  # of the device, or of its host
        while bounds:
            device, bound = bounds.popitem()
            place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
            shards.append(jax.device_put(self.buffers[bound], place))
            shards[-1].block_until_ready()  # else all buffers would wait in memory
            if bound not in bounds.values():  # no replica is left to place
                del self.buffers[bound]
        shape, sharding = self.leaf.shape, self.leaf.sharding
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(tensors, piece) -> np.ndarray:
    # Checked here, where the file and the tensor can be named.
    x = tensors[piece.key].read()
    if not finite(x):
        raise _not_finite(tensors, piece)
    return x


def _not_finite(tensors, piece) -> UserError:
    path = tensors[piece.key].path
    return UserError(f"{path}: {piece.key} holds values that are NaN or infinite")


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array that device_put can use on a CPU without copying it."""
    # XLA's CPU devices take over host memory that is aligned to 64 bytes.
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT  # bytes to the next multiple
    return raw[start : start + size].view(dtype).reshape(shape)


def _overlap(index: tuple, bound: tuple) -> tuple[tuple, tuple] | None:
    """(index in the shard, index in the piece) of their overlap, or None.

    `bound` is the shard's (start, stop) along each axis of the leaf.
    """
    # Missing axes are whole.
    index = index + (slice(None),) * (len(bound) - len(index))
    target, source = [], []
    for i, (start, stop) in zip(index, bound):
        if isinstance(i, slice):  # key_mapping's slices are always whole
            target.append(slice(None))
            source.append(slice(start, stop))
        elif start <= i < stop:  # one layer of a stack, or one of q, k, v
            target.append(i - start)
        else:
            return None
    return tuple(target), tuple(source)


def _cast(x: np.ndarray, dtype) -> np.ndarray:
    """x ready to assign to `dtype`; eight-bit floats by way of float32."""
    eight = x.dtype.itemsize == 1 and x.dtype != dtype
    return x.astype(np.float32) if eight else x


def dtypes(tensors: Tensors, pieces: Sequence[Piece]) -> dict[tuple[str, ...], str]:
    """Dtype of each leaf in the file, by path; the widest if its tensors differ.

    A leaf that the file lacks gets the most common dtype.
    """
    by_path: dict[tuple, set] = {}
    for piece in pieces:
        dtype = {tensors[piece.key].dtype} if piece.key is not None else set()
        by_path.setdefault(piece.path, set()).update(dtype)
    widest = {k: max(v, key=lambda d: d.itemsize) for k, v in by_path.items() if v}
    usual = Counter(widest.values()).most_common(1)[0][0]
    return {path: widest.get(path, usual).name for path in by_path}


def entries(
    variables: Any, pieces: Sequence[Piece], dtype_of: Callable[[tuple], Any]
) -> dict[str, Entry]:
    """Entries of a file of the variables, each leaf in dtype_of(path).

    Every process must call each entry's data(), in order: leaves are gathered from all
    processes.
    """
    arrays = {
        tree.names(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    host: dict[tuple, np.ndarray] = {}

    def data(piece):
        if piece.path not in host:
            host.clear()  # one leaf at a time in host memory
            host[piece.path] = fetch(arrays[piece.path])
        return piece.write(host[piece.path][piece.index])

    return {
        p.key: Entry(
            jnp.dtype(dtype_of(p.path)),
            p.file_shape,
            lambda p=p: data(p),  # bound now: p changes in the loop
        )
        for p in pieces
        if p.key is not None
    }


def part(variables: Any, piece: Piece) -> np.ndarray:
    """The values leaf[index] of a piece, on this host."""
    leaf = variables
    for name in piece.path:
        leaf = leaf[name]
    return fetch(leaf)[piece.index]


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array in host memory; a collective if other hosts have shards."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        # tiled: the global array, without a new axis of processes.
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
