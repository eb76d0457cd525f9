"""Trees of parameters."""

import jax
from flax import linen as nn


def unbox(tree):
    """Without the logical axis names; flax's own would constrain shardings as well."""
    boxed = lambda x: isinstance(x, nn.meta.AxisMetadata)
    bare = lambda x: x.unbox(apply_constraint=False) if boxed(x) else x
    return jax.tree.map(bare, tree, is_leaf=boxed)
