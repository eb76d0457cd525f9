"""Mapping of parameter trees to published files: one table a model, both directions.

A table is a list of groups of rows. A row names a module (or a bare parameter) and its
tensors in a diffusers folder and in an original single file. A group gives its rows a
prefix and, for modules under a scan, the layers that their first axis stacks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sd3_jax import tree
from sd3_jax.params import parametrization

LAYOUTS = ("diffusers", "original")
# PyTorch's names of parameters: norms and embeddings have a "weight" too.
SUFFIX = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


class Kind(NamedTuple):
    """How a file stores a kernel: `read(tensor, shape)` gives ours, `write` inverts it.

    Vectors and embeddings are the same in both. `swap` exchanges the two halves of the
    outputs, for adaLN layers with shift and scale in the other order.
    """

    read: Callable[[np.ndarray, Sequence[int]], np.ndarray]
    write: Callable[[Any], Any]
    swap: bool = False


AS_IS = Kind(lambda x, shape: x.reshape(shape), lambda x: x)
# PyTorch has (out, in), flax (in, *outs).
LINEAR = Kind(lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(len(x), -1).T)
SWAPPED = LINEAR._replace(swap=True)
# (out, in) against (*ins, out): reading is the same, writing merges the inputs.
MERGING = LINEAR._replace(write=lambda x: x.reshape(-1, x.shape[-1]).T)
# PyTorch's OIHW against our HWIO.
CONV = Kind(
    lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
    lambda x: x.transpose(3, 2, 0, 1),
)
# A 1 x 1 convolution (out, in, 1, 1) against a linear map (in, out).
CONV_1X1 = Kind(
    lambda x, shape: x.reshape(len(x), -1).T.reshape(shape),
    lambda x: x.reshape(len(x), -1).T[:, :, None, None],
)


def patches(p: int) -> Kind:
    """A p x p convolution of stride p against a linear map on p x p x c patches."""
    # (out, c, p, p) to (p * p * c, out), in patchify's order: rows, columns, channels.
    return Kind(
        lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape),
        lambda x: x.reshape(p, p, -1, x.shape[-1]).transpose(3, 2, 0, 1),
    )


class Row(NamedTuple):
    """One module (or bare parameter) and its names in the two layouts.

    A sequence of names lists the tensors that our first output axis fuses, in order.
    `original` defaults to the diffusers name ("") and `original_kind` to `kind`. The
    name None says that the layout has no such tensor: loading takes `fill(shape)`. A
    name that ends in "_" takes no dot: "in_proj_" gives "in_proj_weight".
    """

    ours: str
    diffusers: str | Sequence[str] | None
    original: str | Sequence[str] | None = ""
    kind: Kind = LINEAR  # of the kernel; norms and biases are not transposed
    original_kind: Kind | None = None
    fill: Callable[[Sequence[int]], np.ndarray] | None = None

    def names(self, layout: str) -> str | Sequence[str] | None:
        as_diffusers = layout == "diffusers" or self.original == ""
        return self.diffusers if as_diffusers else self.original

    def kind_in(self, layout: str) -> Kind:
        other = layout == "original" and self.original_kind is not None
        return self.original_kind if other else self.kind


class Group(NamedTuple):
    """Rows below a prefix; `{}` in a file's prefix is the layer's number.

    The first axis of our leaves stacks `layers`; None for modules outside a scan.
    """

    ours: str
    diffusers: str
    original: str
    rows: Sequence[Row]
    layers: Sequence[int] | None = None


class Piece(NamedTuple):
    """A tensor `key` of a file and the part `leaf[index]` of our tree that it holds.

    If the layout lacks it, `key` is None and `fill()` gives the values.
    """

    key: str | None
    path: tuple[str, ...]
    index: tuple
    shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]
    fill: Callable[[], np.ndarray] | None = None


def pieces(variables: Any, groups: Sequence[Group], layout: str) -> list[Piece]:
    """All tensors of a `layout` file for a tree of variables, or of their shapes.

    Raises KeyError for a leaf that the table does not name: a parameter must never
    keep its initial value in silence.
    """
    rows = {
        _join(group.ours, row.ours): (group, row)
        for group in groups
        for row in group.rows
    }
    tensors = []
    leaves = jax.tree_util.tree_leaves_with_path(
        variables, is_leaf=parametrization.is_leaf
    )
    for path, leaf in leaves:
        names = tree.names(path)  # the first is the collection, not in the table
        module, parameter = "/".join(names[1:-1]), names[-1]
        bare = "/".join(names[1:])  # a row may name a parameter instead of a module
        group, row = rows[bare] if bare in rows else rows[module]
        parameter = None if bare in rows else parameter
        tensors.extend(
            _of_leaf(names, tuple(leaf.shape), group, row, parameter, layout)
        )
    return tensors


def _of_leaf(path, shape, group, row, parameter, layout) -> Iterator[Piece]:
    names, kind = row.names(layout), row.kind_in(layout)
    prefix = group.diffusers if layout == "diffusers" else group.original
    # AS_IS rows of bare parameters are tables and vectors: no axis to transpose.
    kernel = parameter == "kernel" or (parameter is None and row.kind is not AS_IS)
    for position, layer in enumerate(group.layers or (None,)):
        at = () if group.layers is None else (position,)  # index in the stack
        if names is None:  # the layout lacks it
            yield _piece(None, path, at, shape, kind, kernel, row.fill)
        elif isinstance(names, str):  # one tensor a layer
            key = _key(prefix, layer, names, parameter)
            yield _piece(key, path, at, shape, kind, kernel)
        else:
            for i, name in enumerate(names):
                # A kernel has its inputs before the fused axis, a bias has not.
                index = (*at, slice(None), i) if kernel else (*at, i)
                key = _key(prefix, layer, name, parameter)
                yield _piece(key, path, index, shape, kind, kernel)


def _piece(key, path, index, leaf_shape, kind, kernel, fill=None) -> Piece:
    shape = indexed(leaf_shape, index)
    to_file = kind.write if kernel else AS_IS.write
    if path[-1] in ("bias", "scale"):  # of heads and chunks: one axis in the file
        to_file = _one_axis
    # --- the two directions; biases of swapped halves are swapped as well
    read = kind.read if kernel else AS_IS.read
    exchange = _swap if kind.swap else lambda x: x
    return Piece(
        key,
        path,
        index,
        shape,
        _written_shape(to_file, tuple(map(int, shape))),
        read=lambda x: read(exchange(x), shape),
        write=lambda x: exchange(to_file(x)),
        fill=None if fill is None else lambda: fill(shape),
    )


# Layers have the same shapes, and tracing is slow.
@functools.lru_cache(4096)
def _written_shape(write: Callable, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the file must have, without any values."""
    return jax.eval_shape(write, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def _one_axis(x: Any) -> Any:
    return x.reshape(-1)


def indexed(shape, index):
    """Shape of an array of `shape` indexed with integers and full slices."""
    left = [size for size, i in zip(shape, index) if isinstance(i, slice)]
    return (*left, *shape[len(index) :])


def _swap(x: np.ndarray) -> np.ndarray:
    """Exchange the halves of the first axis; its own inverse."""
    return np.concatenate(np.split(x, 2)[::-1])


def _key(prefix, layer, name, parameter) -> str:
    prefix = prefix.format(layer) if layer is not None else prefix
    parts = filter(None, (prefix, name, SUFFIX.get(parameter, parameter)))
    return ".".join(parts).replace("_.", "_")  # "in_proj_" + "weight"


def _join(*names) -> str:
    return "/".join(filter(None, names))
