"""The current mesh as the models see it, and attention on each of its shards."""

import math
from collections.abc import Callable

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec


def parts(*names: str | None) -> list[int]:
    """Into how many parts the mesh cuts an array of these logical axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [1] * len(names)
    return [_product(mesh, axes) for axes in _axes(*names)]


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that a logical axis is cut over."""
    return _axes(name)[0]


def platform() -> str:
    """What the program being traced is for: the mesh's platform, else the default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def attending(shape: tuple[int, ...]) -> tuple[PartitionSpec | None, int, int]:
    """Mesh axes of rows, queries and heads (b, n, a, k), and how many parts these make:
    of the queries, and of rows and heads together.

    Queries take every axis by which rows and heads do not divide: they are padded, and
    thus always do.
    """
    mesh = jax.sharding.get_abstract_mesh()
    # Outside a mesh, or inside a shard_map over all of it: one device, nothing is cut.
    if mesh.empty or mesh.are_all_axes_manual:
        return None, 1, 1
    rows, heads = _rows_and_heads(mesh, shape)
    rest = tuple(axis for axis in mesh.axis_names if axis not in rows + heads)
    others = _product(mesh, rows + heads)
    return PartitionSpec(rows, rest, heads), mesh.size // others, others


def uneven_heads(heads: int, context: int, tensor: int) -> str:
    """Why Ulysses cannot cut the heads over these axes of a mesh; "" if it can."""
    local = heads // tensor if heads % tensor == 0 else heads
    if local % context == 0:
        return ""
    sizes = ", ".join(str(i) for i in range(1, local + 1) if local % i == 0)
    of = f" on each of tensor = {tensor}" if local < heads else ""
    return (
        f'context_attention "ulysses": context = {context} devices cannot share the'
        f" {local} heads{of}; expected context to be one of {sizes}, or"
        ' context_attention "ring"'
    )


def on_each(attend: Callable, spec: PartitionSpec | None) -> Callable:
    """attend(q, k, v) on each shard, with all keys and values of its rows and heads."""
    if spec is None:
        return attend
    # Keys and values are all-gathered over the axes that cut the queries.
    whole = PartitionSpec(spec[0], None, spec[2])
    # A Pallas kernel does not say over which axes what it returns varies.
    return jax.shard_map(
        attend, in_specs=(spec, whole, whole), out_specs=spec, check_vma=False
    )


def along_tokens(shape: tuple[int, ...]) -> PartitionSpec:
    """How (b, n, a, k) lies where "tokens" alone cuts n: on the axes of "batch" and
    "heads" that divide b and a, else whole."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, heads = _rows_and_heads(mesh, shape)
    return PartitionSpec(rows, mesh_axes("tokens"), heads)


def _rows_and_heads(mesh, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    rows, heads = _axes("batch", "heads")
    rows = rows if shape[0] % _product(mesh, rows) == 0 else ()
    heads = heads if shape[2] % _product(mesh, heads) == 0 else ()
    return rows, heads


def _axes(*names: str | None) -> list[tuple[str, ...]]:
    # flax gives None, a name or a tuple for each axis.
    spec = nn.logical_to_mesh_axes(names)
    return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]


def _product(mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
