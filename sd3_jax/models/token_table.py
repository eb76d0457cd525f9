"""Look up token ids in an embedding table with rows of textual inversion behind it."""

import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from sd3_jax.models.layers import zeros

ADDED = "added_tokens"  # parameter (added, d); its first row has the id `vocab`


def token_states(
    module: nn.Module,
    table: Float[Array, "v d"],
    ids: Int[Array, "b l"],
    added: int,
) -> Float[Array, "b l d"]:
    """Rows of `table`, or for ids from its size on those of the parameter ADDED.

    Call it in a compact method of `module`. The published table stays an array of its
    own, so that added rows neither copy it nor change its sharding.
    """
    if not added:
        return jnp.take(table, ids, axis=0)
    vocab, width = table.shape
    init = nn.with_logical_partitioning(zeros, (None, "embed"))
    rows = module.param(ADDED, init, (added, width))
    # Both ids are clipped into their tables: an id outside of one reads NaN in JAX.
    published = jnp.take(table, jnp.minimum(ids, vocab - 1), axis=0)
    learned = jnp.take(rows, jnp.clip(ids - vocab, 0, added - 1), axis=0)
    return jnp.where((ids >= vocab)[..., None], learned, published)
