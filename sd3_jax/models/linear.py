"""The product of a linear map, and how its weights' gradient leaves a sharded batch."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from sd3_jax.models import shards

Axes = tuple[str | None, ...]


def linear(x: Array, kernel: Array, axes: Axes, inputs: int) -> Array:
    """Contract the last `inputs` axes of x (b, ...) with the first of the kernel, of
    which `axes` are the logical ones.

    Where devices share both rows and weights (FSDP) the weights' gradient is summed by
    reduce-scatter.
    """
    (rows,), (pieces,) = shards.parts("batch"), shards.parts("embed")
    alone = ("embed",) in (axes[:inputs], axes[inputs:])
    fits = alone and kernel.shape[axes.index("embed")] % pieces == 0
    if fits and pieces > 1 and len(x) % rows == 0:
        return scattered(x, kernel, axes, inputs)
    return contract(x, kernel, inputs)


def contract(x: Array, kernel: Array, inputs: int) -> Array:
    """XLA's CPU backend is 1.3 to 1.9 times slower at the backward of
    (b, n, d) @ (d, e) than at that of one flat matrix product. Elsewhere, and over a
    mesh, the axes stay apart: merging them would cost a sharded program its shardings.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if shards.platform() == "cpu" and (mesh.empty or mesh.size == 1):
        rows = math.prod(kernel.shape[:inputs])
        y = x.reshape(-1, rows) @ kernel.reshape(rows, -1)
        return y.reshape(*x.shape[:-inputs], *kernel.shape[inputs:])
    return dot(x, kernel, range(x.ndim - inputs, x.ndim), range(inputs))


def dot(a: Array, b: Array, of_a, of_b) -> Array:
    return jax.lax.dot_general(a, b, ((tuple(of_a), tuple(of_b)), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def scattered(x: Array, kernel: Array, axes: Axes, inputs: int) -> Array:
    return contract(x, kernel, inputs)


def forward(x: Array, kernel: Array, axes: Axes, inputs: int):
    return contract(x, kernel, inputs), (x, kernel)


def backward(axes: Axes, inputs: int, kept: tuple[Array, Array], dy: Array):
    x, kernel = kept
    lead = x.ndim - inputs
    dx = dot(dy, kernel, range(lead, dy.ndim), range(inputs, kernel.ndim))
    first = axes[:inputs] == ("embed",)
    if lead == 1 and len(x) <= math.prod(x.shape[1:]):
        dw = gathered(x, dy)
    elif shards.parts("batch") != shards.parts("embed"):
        dw = summed(x, dy, lead, first)
    else:  # of one group of all devices XLA makes rings by itself, and only so
        dw = dot(x, dy, range(lead), range(lead))
    return dx, nn.with_logical_constraint(dw.reshape(kernel.shape), axes)


scattered.defvjp(forward, backward)


def gathered(x: Array, dy: Array) -> Array:
    """Of few rows (adaLN's, one a picture): with all of them a device makes its piece
    of the gradient by itself, and they are smaller than the pieces."""
    x, dy = (nn.with_logical_constraint(a, (None,) * a.ndim) for a in (x, dy))
    return dot(x, dy, [0], [0])


def summed(x: Array, dy: Array, lead: int, first: bool) -> Array:
    """A reduce-scatter over the devices that share the weights, then a sum over the
    copies of these; `first` says whether it is the kernel's first axis that is sharded,
    or the last.

    XLA makes it of a matrix whose pieces lie on an axis of their own, in front. Left to
    its partitioner, or of heads apart, every device gets all of the sum, which sends
    twice as much.
    """
    rows, over = shards.mesh_axes("batch"), shards.mesh_axes("embed")
    (pieces,) = shards.parts("embed")
    copies = tuple(axis for axis in rows if axis not in over)
    whole = shards.parts("tokens") == shards.parts("heads") == [1]

    def local(x, dy):
        a, b = (x, dy) if first else (dy, x)  # the sharded axis is a's last
        count = lead
        if whole:
            a, b = (y.reshape(-1, math.prod(y.shape[lead:])) for y in (a, b))
            count = 1
        dw = dot(a, b, range(count), range(count))  # (embed, ...)
        dw = dw.reshape(pieces, -1, *dw.shape[1:])
        if shards.platform() == "cpu":  # where XLA aborts at these sums in bfloat16
            dw = dw.astype(jnp.float32)
        dw = jax.lax.psum_scatter(dw, over, scatter_dimension=0)
        return jax.lax.psum(dw, copies).astype(x.dtype)

    dw = jax.shard_map(
        local,
        in_specs=PartitionSpec(rows),
        out_specs=PartitionSpec(over),
        axis_names={*rows, *over},
        check_vma=False,
    )(x, dy)
    return dw if first else jnp.moveaxis(dw, 0, -1)
