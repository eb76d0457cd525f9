"""A linear map whose weights' gradient is reduced to its shards (FSDP).

XLA's partitioner would give every device the whole sum of some gradients, which sends
twice as much as a reduce-scatter.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from sd3_jax.distributed import mesh_context

Axes = tuple[str | None, ...]
# What a matrix unit sums products of eight bits in: their own dtype would overflow.
SUMS = {"int8": jnp.int32, "float8_e4m3fn": jnp.float32}


def linear(
    x: Array,
    kernel: Array,
    axes: Axes,
    inputs: int,
    finish: Callable[[Array], Array] = lambda y: y,
) -> Array:
    """Contract the last `inputs` axes of x (b, ...) with the first of the kernel.

    `axes` are the kernel's logical axes. Where the same devices shard both batch and
    weights (FSDP), a reduce-scatter sums the weights' gradient. For vectors, one a
    row of the batch, the rows move between devices and the weights stay. `finish` maps
    the product number by number; its outputs may be one flat axis.
    """
    (rows,), (pieces,) = mesh_context.parts("batch"), mesh_context.parts("embed")
    vectors = x.ndim - inputs == 1 and axes[-1] == "embed"  # x (b, k), as adaLN's
    if pieces == 1 and vectors and len(x) % rows == 0:
        return finish(shared_out(x, kernel, inputs))
    # Nothing to scatter, or a batch that does not divide: left to the partitioner.
    if pieces == 1 or "embed" not in axes or len(x) % rows:
        return finish(contract(x, kernel, inputs))
    if kernel.shape[axes.index("embed")] % pieces == 0:
        if vectors:
            return finish(exchanged(x, kernel, inputs))
        if ("embed",) in (axes[:inputs], axes[inputs:]):
            # Merging axes of which "tensor" shards one would cost their shardings.
            if mesh_context.parts("heads") == [1]:
                return flat(x, kernel, axes, inputs, finish)
            return finish(scattered(x, kernel, axes, inputs))
    return finish(contract(x, kernel, inputs))


def shared_out(x: Array, kernel: Array, inputs: int) -> Array:
    """Rows x (b, ...) times a kernel that every device has whole.

    Each device of the context and tensor axes, which have the same rows, multiplies
    them by a piece of the last axis: it reads that piece of the weights alone.
    """
    over = mesh_context.mesh_axes("tokens") + mesh_context.mesh_axes("heads")
    tokens, heads = mesh_context.parts("tokens", "heads")
    if tokens * heads == 1 or kernel.shape[-1] % (tokens * heads):
        return contract(x, kernel, inputs)
    row, none = PartitionSpec(mesh_context.mesh_axes("batch")), (None,)
    piece = PartitionSpec(*none * (kernel.ndim - 1), over)

    def local(x, kernel):
        y = contract(x, kernel, inputs)
        return jax.lax.all_gather(y, over, axis=y.ndim - 1, tiled=True)

    whole = PartitionSpec(*row, *none * (kernel.ndim - inputs))
    specs = dict(in_specs=(row, piece), out_specs=whole)
    return jax.shard_map(local, **specs, check_vma=False)(x, kernel)


def flat(
    x: Array, kernel: Array, axes: Axes, inputs: int, finish: Callable = lambda y: y
) -> Array:
    """The same product with the kernel as a matrix, which is what devices then gather.

    A TPU stores and sends the last two axes in tiles of 8 x 128, of which heads of 64
    fill half.
    """
    size = math.prod(kernel.shape[:inputs])
    merged = lambda axes: axes[0] if len(axes) == 1 else None
    names = merged(axes[:inputs]), merged(axes[inputs:])
    y = scattered(
        x.reshape(*x.shape[: x.ndim - inputs], size),
        nn.with_logical_constraint(kernel.reshape(size, -1), names),
        names,
        1,
    )
    y = finish(y)  # first, for a TPU would copy sums of 32 bits to take them apart
    return y.reshape(*y.shape[:-1], *kernel.shape[inputs:])


def contract(x: Array, kernel: Array, inputs: int) -> Array:
    """The product itself; on a single CPU device as one flat matrix product."""
    # XLA's CPU backend is 1.1 to 1.9 times slower at the backward of (b, n, d) @ (d, e)
    # than at that of one flat product (benchmarks/digits.md). Elsewhere, and on a mesh,
    # the axes stay apart: merging them would cost a sharded program its shardings.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh_context.platform() == "cpu" and (mesh.empty or mesh.size == 1):
        rows = math.prod(kernel.shape[:inputs])
        y = dot(x.reshape(-1, rows), kernel.reshape(rows, -1), [1], [0])
        return y.reshape(*x.shape[:-inputs], *kernel.shape[inputs:])
    return dot(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs))


def dot(a: Array, b: Array, of_a, of_b) -> Array:
    """Contract the axes `of_a` of a with the axes `of_b` of b.

    Products of int8 are summed in int32, those of fp8 in float32.
    """
    axes = ((tuple(of_a), tuple(of_b)), ((), ()))
    sum_type = SUMS.get(a.dtype.name)  # None: that of a and b
    return jax.lax.dot_general(a, b, axes, preferred_element_type=sum_type)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scattered(x: Array, kernel: Array, axes: Axes, inputs: int) -> Array:
    return contract(x, kernel, inputs)


def forward(x: Array, kernel: Array, axes: Axes, inputs: int):
    return contract(x, kernel, inputs), (x, kernel)


def backward(axes: Axes, inputs: int, residuals: tuple[Array, Array], dy: Array):
    x, kernel = residuals
    lead = x.ndim - inputs  # axes of batch and tokens
    dx = dot(dy, kernel, range(lead, dy.ndim), range(inputs, kernel.ndim))
    first = axes[:inputs] == ("embed",)
    if mesh_context.parts("batch") != mesh_context.parts("embed"):
        dw = summed(x, dy, lead, first)
    else:  # one group of all devices: left alone, XLA makes rings of the product
        dw = dot(x, dy, range(lead), range(lead))
    return dx, nn.with_logical_constraint(dw.reshape(kernel.shape), axes)


scattered.defvjp(forward, backward)


def summed(x: Array, dy: Array, lead: int, first: bool) -> Array:
    """The weights' gradient: reduce-scattered over their shards, summed over replicas.

    `first` says whether the kernel's first axis is sharded, or its last.
    """
    # XLA emits a reduce-scatter only for a matrix whose pieces lie on an axis of their
    # own, in front. Left to the partitioner, or with heads apart, it all-reduces.
    rows, over = mesh_context.mesh_axes("batch"), mesh_context.mesh_axes("embed")
    (pieces,) = mesh_context.parts("embed")
    copies = tuple(axis for axis in rows if axis not in over)

    def local(x, dy):
        # Batch and tokens stay apart: a TPU would copy x and dy to merge them.
        a, b = (x, dy) if first else (dy, x)  # the sharded axis is a's last
        dw = dot(a, b, range(lead), range(lead))  # (embed, ...)
        dw = dw.reshape(pieces, -1, *dw.shape[1:])  # (pieces, embed/pieces, ...)
        if mesh_context.platform() == "cpu":
            dw = dw.astype(jnp.float32)  # XLA's CPU backend aborts at bfloat16 sums
        dw = jax.lax.psum_scatter(dw, over, scatter_dimension=0)
        return jax.lax.psum(dw, copies).astype(x.dtype)

    dw = jax.shard_map(
        local,
        in_specs=PartitionSpec(rows),
        out_specs=PartitionSpec(over),
        axis_names={*rows, *over},  # "context" and "tensor" stay with the partitioner
        check_vma=False,
    )(x, dy)
    return dw if first else jnp.moveaxis(dw, 0, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchanged(x: Array, kernel: Array, inputs: int) -> Array:
    """Rows x (b, ...) times a kernel sharded along its last axis, without moving it.

    Each device gathers the rows of its FSDP group, multiplies them by its piece, and
    an all-to-all brings each row's outputs together.
    """
    # Rows are smaller than weights: for SD3's adaLN, at 8 rows a device, a hundredth.
    over = mesh_context.mesh_axes("embed")

    def local(x, kernel):
        x = jax.lax.all_gather(x, over, tiled=True)  # the group's rows
        y = contract(x, kernel, inputs)  # (rows, ..., out/pieces)
        return jax.lax.all_to_all(y, over, 0, y.ndim - 1, tiled=True)

    return by_rows(local, kernel.ndim)(x, kernel)


def exchanged_forward(x: Array, kernel: Array, inputs: int):
    return exchanged(x, kernel, inputs), (x, kernel)


def exchanged_backward(inputs: int, residuals: tuple[Array, Array], dy: Array):
    x, kernel = residuals
    rows, over = mesh_context.mesh_axes("batch"), mesh_context.mesh_axes("embed")
    copies = tuple(axis for axis in rows if axis not in over)  # replicas of the weights
    few = len(dy) <= math.prod(kernel.shape[:inputs])

    def local(x, kernel, dy):
        dy = jax.lax.all_to_all(dy, over, dy.ndim - 1, 0, tiled=True)
        # float32: dx is a sum over pieces on several devices, as dw over replicas.
        ends = range(1, dy.ndim), range(inputs, kernel.ndim)
        dx = dot(dy.astype(jnp.float32), kernel.astype(jnp.float32), *ends)
        dx = jax.lax.psum_scatter(dx, over, scatter_dimension=0, tiled=True)
        dx = dx.astype(x.dtype)
        x = jax.lax.all_gather(x, over, tiled=True)
        if few:  # gathering all rows sends less than summing the replicas' gradients
            x, dy = (jax.lax.all_gather(a, copies, tiled=True) for a in (x, dy))
            return dx, dot(x, dy, [0], [0])
        dw = dot(x.astype(jnp.float32), dy.astype(jnp.float32), [0], [0])
        return dx, jax.lax.psum(dw, copies).astype(kernel.dtype)

    return by_rows(local, kernel.ndim, backward=True)(x, kernel, dy)


exchanged.defvjp(exchanged_forward, exchanged_backward)


def by_rows(local: Callable, axes: int, *, backward: bool = False) -> Callable:
    """shard_map of local(x, kernel, ...) over rows and the kernel's last axis."""
    rows, over = mesh_context.mesh_axes("batch"), mesh_context.mesh_axes("embed")
    row, piece = PartitionSpec(rows), PartitionSpec(*(None,) * (axes - 1), over)
    return jax.shard_map(
        local,
        in_specs=(row, piece, row) if backward else (row, piece),
        out_specs=(row, piece) if backward else row,
        axis_names={*rows, *over},
        check_vma=False,
    )
