"""A file's tensors straight into their shardings, and leaves back to tensors.

A process holds its own shards, READERS tensors of the file and, where devices have
memory of their own, one leaf of its shards while that moves there. What is to be in
eight bits is rounded a tensor at a time: of the rest no more is there than those.
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
from sd3_jax.errors import UserError
from sd3_jax.params import parametrization, quantization
from sd3_jax.params.quantization import Quantized
from sd3_jax.weights import key_mapping, safetensors
from sd3_jax.weights.key_mapping import Piece
from sd3_jax.weights.safetensors import Entry, Tensors

LISTED = 10  # names in an error, at most
READERS = 4  # threads, a tensor each; numpy reads, turns and casts without the GIL
ALIGNMENT = 64  # bytes; XLA's CPU devices copy host memory that is less aligned


def check(
    tensors: Mapping[str, Any],
    pieces: Sequence[Piece],
    *,
    where: str,
    ignored: Sequence[str] = (),
) -> None:
    """Every tensor is used and every parameter covered, or the error lists them. None
    is of integers, which mean something only with scales that we do not know.

    `ignored` are ends of names that a file may have and nothing reads.
    """
    wanted = {p.key: p.file_shape for p in pieces if p.key is not None}
    missing = [f"{k} is missing" for k in wanted if k not in tensors]
    extra = [
        f"{k} is not known"
        for k in tensors
        if k not in wanted and not k.endswith(tuple(ignored))
    ]
    shapes = [
        f"{k} is {list(tensors[k].shape)}, wanted {list(shape)}"
        for k, shape in wanted.items()
        if k in tensors and tuple(tensors[k].shape) != shape
    ]
    if wrong := missing + extra + shapes:
        listed = "; ".join(wrong[:LISTED]) + (" …" if len(wrong) > LISTED else "")
        raise UserError(
            f"{where}: {len(missing)} missing, {len(extra)} extra, {len(shapes)}"
            f" of another shape: {listed}"
        )
    if integers := [k for k in wanted if np.dtype(tensors[k].dtype).kind in "biu"]:
        name = integers[0]
        raise UserError(
            f"{where}: {name} is of {np.dtype(tensors[name].dtype)}, wanted floats: the"
            f" file is quantized ({len(integers)} tensors of integers)"
        )


def load(tensors: Tensors, abstract: Any, pieces: Sequence[Piece]) -> Any:
    """The tree that `abstract` describes: shapes, dtypes and shardings, or in the place
    of such a shape what stands for it (models/quantized.py)."""
    by_leaf = {k: list(p) for k, p in groupby(pieces, key=lambda piece: piece.path)}

    def leaf(path, x):
        return _load_leaf(tensors, x, by_leaf[tree.names(path)])

    return jax.tree_util.tree_map_with_path(
        leaf, abstract, is_leaf=parametrization.is_leaf
    )


def _load_leaf(tensors, leaf, pieces) -> Any:
    wanted, treedef = jax.tree.flatten(leaf)  # one, or q and its scale
    filling = [_Shards(x) for x in wanted]

    def bring(piece):
        if not any(x.has(piece.index) for x in filling):
            return  # another process's layers
        part = piece.fill() if piece.key is None else piece.read(_read(tensors, piece))
        parts = [part]
        if isinstance(leaf, Quantized):
            scale = key_mapping.indexed(leaf.scale.shape, piece.index)
            parts = quantization.on_host(part, type(leaf), scale)
        for x, values in zip(filling, parts):
            x.fill(piece.index, values)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(bring, pieces))  # each fills a part of its own
    return jax.tree.unflatten(treedef, [x.array() for x in filling])


class _Shards:
    """An array's shards on this process's devices, filled on the host."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf, sharding = leaf, leaf.sharding
        places = sharding.addressable_devices_indices_map(leaf.shape)
        self.bounds = {
            device: tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape))
            for device, index in places.items()
        }
        self.buffers = {
            bound: _aligned([stop - start for start, stop in bound], leaf.dtype)
            for bound in self.bounds.values()
        }

    def has(self, index: tuple) -> bool:
        return any(_overlap(index, bound) for bound in self.buffers)

    def fill(self, index: tuple, part: np.ndarray) -> None:
        for bound, buffer in self.buffers.items():
            if selection := _overlap(index, bound):
                target, source = selection
                buffer[target] = _cast(part[source], buffer.dtype)

    def array(self) -> jax.Array:
        """On the devices; each buffer goes as its shards are there."""
        shards, bounds = [], self.bounds
        while bounds:
            device, bound = bounds.popitem()
            shards.append(jax.device_put(self.buffers[bound], device))
            shards[-1].block_until_ready()
            if bound not in bounds.values():
                del self.buffers[bound]
        shape, sharding = self.leaf.shape, self.leaf.sharding
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _read(tensors, piece) -> np.ndarray:
    x = tensors[piece.key].read()
    if not safetensors.finite(x):
        path = tensors[piece.key].path
        raise UserError(f"{path}: {piece.key} holds values that are NaN or infinite")
    return x


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Empty, for device_put: a CPU's devices take it as it is, replicas share it."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _overlap(index: tuple, bound: tuple) -> tuple[tuple, tuple] | None:
    """Where in a shard a piece goes and which of it, or None if nowhere."""
    index = index + (slice(None),) * (len(bound) - len(index))
    target, source = [], []
    for i, (start, stop) in zip(index, bound):
        if isinstance(i, slice):
            target.append(slice(None))
            source.append(slice(start, stop))
        elif start <= i < stop:
            target.append(i - start)
        else:
            return None
    return tuple(target), tuple(source)


def _cast(x: np.ndarray, dtype) -> np.ndarray:
    """To `dtype`; eight bits go by float32, numpy knowing no shorter way."""
    eight = x.dtype.itemsize == 1 and x.dtype != dtype
    return x.astype(np.float32) if eight else x


def dtypes(tensors: Tensors, pieces: Sequence[Piece]) -> dict[tuple[str, ...], str]:
    """The dtype of each leaf's tensors in the file, the widest if they differ.

    A leaf that the file lacks is as most others are.
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
    """What a file is to hold, each leaf in the dtype that its path has.

    Every process must ask each entry for its data, in order.
    """
    arrays = {
        tree.names(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    host: dict[tuple, np.ndarray] = {}

    def data(piece):
        if piece.path not in host:
            host.clear()  # one leaf at a time
            host[piece.path] = fetch(arrays[piece.path])
        return piece.write(host[piece.path][piece.index])

    return {
        p.key: Entry(
            jnp.dtype(dtype_of(p.path)),
            p.file_shape,
            lambda p=p: data(p),
        )
        for p in pieces
        if p.key is not None
    }


def part(variables: Any, piece: Piece) -> np.ndarray:
    """The part of our tree that a piece is, on this host."""
    leaf = variables
    for name in piece.path:
        leaf = leaf[name]
    return fetch(leaf)[piece.index]


def fetch(x: jax.Array) -> np.ndarray:
    """A whole array on this host, from wherever its shards are."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
