"""Trees of parameters."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array


def unbox(tree):
    """Without the logical axis names; flax's own would constrain shardings as well."""
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
    bare = lambda x: x.unbox(apply_constraint=False) if boxed(x) else x
    return jax.tree.map(bare, tree, is_leaf=boxed)


def names(path) -> tuple[str, ...]:
    """A path of jax.tree_util as plain strings."""
    return tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)


def count(tree) -> int:
    """Numbers in all leaves."""
    return sum(x.size for x in jax.tree.leaves(tree))


def fingerprint(tree) -> str:
    """Twelve hexadecimal digits of every leaf's name, shape, dtype and bits.

    Each bit pattern is multiplied by an odd number of its place and the products added
    modulo 2^32, on the devices: no mesh and no order of addition changes the sum.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.jit(lambda leaves: jnp.stack([*map(_bits, leaves)]))
    digest = hashlib.sha256(np.asarray(sums([x for _, x in leaves])).tobytes())
    for path, x in leaves:
        digest.update(f"{jax.tree_util.keystr(path)}{x.dtype}{x.shape}".encode())
    return digest.hexdigest()[:12]


def _bits(x: Array) -> Array:
    kind = {2: jnp.uint16, 4: jnp.uint32, 1: jnp.uint8}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        at = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = place * jnp.uint32(size) + at
    place = place * jnp.uint32(0x9E3779B1)  # golden: spreads the places over all bits
    return jnp.sum(bits * (place | 1), dtype=jnp.uint32)
