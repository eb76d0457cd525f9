"""The mesh, the one table from logical to mesh axes, and batches onto the mesh."""

import itertools
import logging
import math
from collections import Counter

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sd3_jax import tree
from sd3_jax.distributed import mesh_context
from sd3_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that cut the rows of a batch
# Logical to mesh axes, in order of precedence: flax takes the first rule of a name
# whose mesh axes are still free in the array at hand.
RULES = (
    ("batch", BATCH),
    ("tokens", "context"),
    ("height", AXES),  # where the rows of a batch do not take theirs
    ("height", ("context", "tensor")),
    ("embed", "fsdp"),
    ("vocab", None),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)
LARGE = 2**20  # elements; a weight of as many is never replicated silently
log = logging.getLogger(__name__)


def make_mesh(
    data: int = 1, fsdp: int = -1, context: int = 1, tensor: int = 1, *, devices=None
) -> Mesh:
    """A mesh over all devices, of all slices; -1 takes what the other axes leave."""
    if devices is None:
        devices = jax.devices()
        refuse_uneven(devices)
    sizes = [data, fsdp, context, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        if len(devices) % known:
            there = f"{len(devices)} device{'s' * (len(devices) > 1)}"
            raise UserError(
                f"config.mesh = {_spell(sizes)}: {known} does not divide the {there};"
                f" set axes whose product divides {len(devices)}"
            )
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh = {_spell(sizes)} needs {math.prod(sizes)} devices but there"
            f" are {len(devices)}; set one axis to -1 to use all that the others leave"
        )
    # jax makes Explicit axes by default, which refuse whatever the partitioner is to
    # solve: an ordinary FSDP matmul is an error there.
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spread(mesh: Mesh, rows: int) -> Mesh:
    """The mesh for a batch of so many rows: where data and fsdp do not divide them, the
    devices that would have none join the context axis.

    Devices keep their order, so that arrays on `mesh` lie as they did.
    """
    shards = batch_shards(mesh)
    groups = math.gcd(shards, rows)
    # Keys and values would cross from slice to slice.
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    if groups == shards or len(slices) > 1:
        return mesh
    data = math.gcd(mesh.shape["data"], groups)
    sizes = data, groups // data, -1, mesh.shape["tensor"]
    return Mesh(mesh.devices.reshape(sizes), AXES, axis_types=mesh.axis_types)


def require_context(method: str, heads: int, mesh: Mesh) -> None:
    """UserError if Ulysses cannot share so many heads over the mesh."""
    sizes = mesh.shape["context"], mesh.shape["tensor"]
    if method == "ulysses" and (reason := mesh_context.uneven_heads(heads, *sizes)):
        raise UserError(reason)


def refuse_uneven(devices) -> None:
    """UserError for processes with unlike numbers of devices.

    Rows of a batch and shards of a save are cut evenly over the processes.
    """
    counts = Counter(device.process_index for device in devices)
    for index in (i for i in sorted(counts) if counts[i] != counts[0]):
        raise UserError(
            f"processes 0 and {index} have {counts[0]} and {counts[index]} devices;"
            " every process must have the same number (see CUDA_VISIBLE_DEVICES,"
            " TPU_VISIBLE_CHIPS, --xla_force_host_platform_device_count)"
        )


def arrange(sizes: list[int], devices) -> np.ndarray:
    """Neighbours along every axis but data, which alone crosses from slice to slice.

    An axis may take a part of one of the torus's: 128 of 16 x 16.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return in_rings(
            mesh_utils.create_device_mesh(
                sizes, devices, allow_split_physical_axes=True
            )
        )
    # Between slices lies the data-centre network, far slower than a slice's own links.
    # Over data only gradients travel.
    data, *rest = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data = {data}: only this axis crosses slices, and there are"
            f" {slices}; must be a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest),
        (slices, *(1 for _ in rest)),
        devices,
        allow_split_physical_axes=True,
    )


def in_rings(devices: np.ndarray) -> np.ndarray:
    """The mesh's devices with those along context in a ring of neighbours, if there is
    an order with fewer hops between chips.

    A 2 x 2 of chips is in the order of its rows, whose ring would cross it twice. More
    than 8 devices keep their order.
    """
    count = devices.shape[AXES.index("context")]
    if not 4 <= count <= 8 or not hasattr(devices.flat[0], "coords"):
        return devices
    apart = distances(devices)
    # Fixed at its first device: a ring may begin anywhere.
    orders = ((0, *rest) for rest in itertools.permutations(range(1, count)))
    # Of equal ones min takes the first, which is the order as it is.
    order = min(orders, key=lambda order: apart[order, order[1:] + order[:1]].sum())
    return devices[:, :, order]


def distances(devices: np.ndarray) -> np.ndarray:
    """Hops between two places along context, summed over the other axes."""
    coords = np.array([device.coords for device in devices.flat])
    coords = np.moveaxis(coords.reshape(*devices.shape, -1), 2, 0)
    return np.abs(coords[:, None] - coords).sum((2, 3, 4, 5))


def _spell(sizes):
    return ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))


def shardings(boxed, mesh: Mesh):
    """NamedShardings for an abstract tree whose leaves carry logical axis names.

    An axis that a mesh axis does not divide is replicated; for a large weight that is
    an error, which names the sizes that would do.
    """

    def leaf(path, x):
        names = x.names if isinstance(x, nn.LogicallyPartitioned) else ()
        shape = jax.tree.leaves(x)[0].shape
        spec = nn.logical_to_mesh_axes(names, RULES) if names else PartitionSpec()
        fitting = [
            axes if size % _product(mesh, axes) == 0 else None
            for size, axes in zip(shape, spec)
        ]
        if fitting != list(spec):
            _refuse_or_note(jax.tree_util.keystr(path), shape, spec, mesh)
        return NamedSharding(mesh, PartitionSpec(*fitting))

    # Leaves are the boxes: the arrays inside them have no names.
    box = lambda x: isinstance(x, nn.LogicallyPartitioned)
    return jax.tree_util.tree_map_with_path(leaf, boxed, is_leaf=box)


def _product(mesh: Mesh, axes) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def _refuse_or_note(name, shape, spec, mesh):
    wanted = ", ".join(
        f"{size} by {axes}={_product(mesh, axes)}"
        for size, axes in zip(shape, spec)
        if size % _product(mesh, axes)
    )
    if math.prod(shape) >= LARGE:
        raise UserError(
            f"config.mesh: weight {name} of shape {shape} cannot be split: {wanted};"
            " choose a divisor, and give the other devices to config.mesh.data"
        )
    log.info("%s of shape %s is replicated: %s does not divide", name, shape, wanted)


def like_params(like, params, sharded, mesh: Mesh):
    """Shardings for a tree such as optimizer state. A leaf whose path ends in a
    parameter's is sharded as that parameter if it has its shape, and as the axes that
    are left if it lacks one of them (Adafactor's rows and columns). Others are
    replicated."""
    # Optimizer states wrap the tree of parameters at any depth, so a leaf is matched by
    # the end of its path.
    known = {
        tree.names(path): (leaf.shape, s.spec)
        for (path, leaf), s in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(sharded)
        )
    }

    def leaf(path, x):
        names = tree.names(path)
        for i in range(len(names)):
            shape, spec = known.get(names[i:], (None, None))
            if shape == x.shape:
                return NamedSharding(mesh, spec)
            # Adafactor keeps a mean over rows and one over columns: an axis less.
            for axis in range(len(shape or ())):
                if shape[:axis] + shape[axis + 1 :] == x.shape:
                    axes = (*spec, *[None] * len(shape))[: len(shape)]
                    rest = axes[:axis] + axes[axis + 1 :]
                    return NamedSharding(mesh, PartitionSpec(*rest))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(leaf, like)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Cuts the first axis over data and fsdp and leaves the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are cut."""
    return _product(mesh, BATCH)


def local_rows(
    mesh: Mesh,
    batch_size: int,
    *,
    process: int | None = None,
    key: str = "data.batch_size",
) -> np.ndarray:
    """Indices of the batch rows that a process's devices hold, in increasing order.

    The process is this one by default. Its rows are rarely contiguous: a TPU mesh
    follows the torus, not the hosts. Two processes share a row if an axis other than
    data and fsdp crosses between them. `key` is the config's, for the error.
    """
    process = jax.process_index() if process is None else process
    shards = batch_shards(mesh)
    if batch_size % shards:
        near = max(shards, round(batch_size / shards) * shards)
        raise UserError(
            f"config.{key} = {batch_size}: must be a multiple of data x fsdp ="
            f" {shards}, such as {near}"
        )
    # Asked of jax, not computed: a mesh does not have its devices in the order of ids.
    index_of = batch_sharding(mesh).devices_indices_map((batch_size,))
    spans = {
        index[0].indices(batch_size)
        for device, index in index_of.items()
        if device.process_index == process
    }
    return np.concatenate([np.arange(*span) for span in sorted(spans)])


def put(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int):
    """This process's rows of a batch to global arrays, sharded over data and fsdp.

    The rows come in the order of `local_rows`: jax takes those of the lowest shard
    first, then those of the next shard that this process has.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, rows, (batch_size, *rows.shape[1:])
        )
        for name, rows in batch.items()
    }
