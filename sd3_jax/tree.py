"""Trees of parameters: names, sizes and fingerprints."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from sd3_jax.foreign_text import listed

TURN = 2**30  # bytes that fingerprints moves to the devices at a time


def unbox(tree):
    """The tree without flax's boxes of logical axis names."""
    # flax's own unbox would constrain shardings as well.
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
    bare = lambda x: x.unbox(apply_constraint=False) if boxed(x) else x
    return jax.tree.map(bare, tree, is_leaf=boxed)


def names(path) -> tuple[str, ...]:
    """A jax.tree_util path as plain strings."""
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def path_name(path) -> str:
    """A jax.tree_util path as "a/b/0"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mismatch(wanted: Mapping[str, Any], present: Mapping[str, Any], kind: str) -> str:
    """How leaves by name differ in their `kind`, for a message; "" if they agree."""
    missing = [f"{name} is missing" for name in wanted if name not in present]
    extra = [f"{name} is not known" for name in present if name not in wanted]
    other = [
        f"{name} is {present[name]}, expected {x}"
        for name, x in wanted.items()
        if present.get(name, x) != x
    ]
    if not (faults := missing + extra + other):
        return ""
    return (
        f"{len(missing)} missing, {len(extra)} extra, {len(other)} of another {kind}:"
        f" {listed(faults, '; ')}"
    )


def count(tree) -> int:
    """Number of values in all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


class Print(NamedTuple):
    """A leaf's hash of all bits, and its number of values that are NaN or infinite."""

    word: int
    strange: int


def fingerprints(tree) -> dict[str, Print]:
    """The Print of each leaf, by its name "a/b/c".

    Does not depend on the mesh. A change of a single value always changes the hash.
    """
    # Each bit pattern is mixed with its index, and the results are added modulo 2^32 on
    # the devices: integer addition has no order. The mixing is one to one.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    # Weights that rest in host memory go to the devices in turn.
    batches = _batches([x for _, x in leaves])
    table = [row for xs in batches for row in np.asarray(_prints(_placed(xs)))]
    rows = zip(leaves, table)
    return {path_name(path): Print(*map(int, row)) for (path, _), row in rows}


def _batches(leaves: list) -> list[list]:
    """The leaves in order; of those in host memory at most about TURN bytes each."""
    batches, held = [], 0
    for x in leaves:
        size = x.nbytes if _rests(x) else 0
        if not batches or held + size > TURN:
            batches.append([])
            held = 0
        batches[-1].append(x)
        held += size
    return batches


def _rests(x: Any) -> bool:
    return isinstance(x, Array) and x.sharding.memory_kind == "pinned_host"


def _placed(xs: list) -> list:
    place = lambda x: jax.device_put(x, x.sharding.with_memory_kind("device"))
    return [place(x) if _rests(x) else x for x in xs]


def fingerprint(tree) -> str:
    """Twelve hexadecimal digits of all leaves' names, shapes, dtypes and bits."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    words = [x.word for x in fingerprints(tree).values()]
    digest = hashlib.sha256(np.array(words, np.uint32).tobytes())
    for path, x in leaves:
        digest.update(f"{jax.tree_util.keystr(path)}{x.dtype}{x.shape}".encode())
    return digest.hexdigest()[:12]


@jax.jit
def _prints(leaves: list[Array]) -> Array:
    return jnp.stack([*map(_print, leaves)])


@jax.jit  # traced once for all leaves of a shape
def _print(x: Array) -> Array:
    kind = {2: jnp.uint16, 4: jnp.uint32, 1: jnp.uint8}[x.dtype.itemsize]
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    strange = ~jnp.isfinite(x) if floating else jnp.zeros(x.shape, bool)
    x = x.astype(kind) if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    # The flat index of each value, modulo 2^32, without a reshape across shards.
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + at
    place = place * jnp.uint32(0x9E3779B1)  # golden: spreads the places over all bits
    word = (x.astype(jnp.uint32) ^ place) * jnp.uint32(0x85EBCA6B)
    word = word ^ (word >> 15)  # lest flips of two high bits cancel
    terms, zero = (word, strange.astype(jnp.uint32)), jnp.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])
    # Together: XLA reads the leaf once, and on a CPU 30 times as fast as for two sums.
    return jnp.stack(jax.lax.reduce(terms, (zero, zero), add, tuple(range(x.ndim))))
