"""Attention in blocks of heads and queries, whose logits alone exist at a time.

The backward pass recomputes the softmax of each block from the logarithm of its
denominator, as FlashAttention does (Dao et al. 2022), in plain XLA.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from sd3_jax.distributed import mesh_context

ROWS = 256  # queries a block, at least: each block reads all keys and values
MASKED = -1e30  # a logit that does not count; finite, since inf - inf is none


def blockwise(
    q: Float[Array, "b n a k"],
    k: Float[Array, "b m a k"],
    v: Float[Array, "b m a k"],
    scale: float,
    limit: int,
) -> Float[Array, "b n a k"]:
    """softmax(q k^T * scale) v in blocks of at most `limit` bytes of float32 logits.

    A block has at least ROWS queries (or all), even if that exceeds `limit`. The limit
    is for each device; the backward pass computes the logits again.
    """
    # Small blocks stay in a CPU's cache (docs/explanation/speed.md).
    spec, parts, _ = mesh_context.attending(q.shape)
    n = q.shape[1]

    def local(q, k, v):
        blocks = blocks_of(q.shape, k.shape[1], limit)
        out = attend(blocks.queries(q), blocks.keys(k), blocks.keys(v), scale)
        return blocks.restored(out, q.shape)

    # Queries of padding are cut off again; keys have none, so nothing is masked.
    q = jnp.pad(q, ((0, 0), (0, -n % parts), (0, 0), (0, 0)))
    return mesh_context.on_each(local, spec)(q, k, v)[:, :n]


class Blocks(NamedTuple):
    """Heads in groups of `group`, and their queries in `blocks` blocks of `rows`."""

    group: int
    rows: int
    blocks: int

    def keys(self, x: Array) -> Array:
        """(b, m, a, k) to (groups, group, m, k)."""
        return x.swapaxes(1, 2).reshape(-1, self.group, x.shape[1], x.shape[3])

    def queries(self, x: Array) -> Array:
        """(b, n, a, k), padded, to (groups, blocks, group, rows, k)."""
        size, padding = x.shape[3], self.blocks * self.rows - x.shape[1]
        x = jnp.pad(self.keys(x), ((0, 0), (0, 0), (0, padding), (0, 0)))
        x = x.reshape(-1, self.group, self.blocks, self.rows, size)
        return x.swapaxes(1, 2)

    def restored(self, x: Array, shape: Sequence[int]) -> Array:
        """(groups, blocks, group, rows, k) to (b, n, a, k), the inverse of `queries`;
        the last axis may have another size than that of `shape`."""
        b, n, heads, _ = shape
        x = x.swapaxes(1, 2).reshape(b, heads, self.blocks * self.rows, x.shape[-1])
        return x[:, :, :n].swapaxes(1, 2)


def blocks_of(shape: Sequence[int], m: int, limit: int) -> Blocks:
    """Blocks for queries (b, n, a, k) to m keys, of about `limit` bytes of logits."""
    b, n, heads, _ = shape
    # Whole heads first, for as many as fit; else some queries of a single head.
    group = largest_divisor(b * heads, limit // (4 * n * m))
    rows = min(n, max(ROWS, limit // (4 * group * m)))
    rows = -(-n // -(-n // rows))  # about equal blocks, so that padding is small
    return Blocks(group, rows, -(-n // rows))


def largest_divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, and at least 1."""
    return max(i for i in range(1, max(1, min(n, most)) + 1) if n % i == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    q: Float[Array, "groups blocks g n k"],
    k: Float[Array, "groups g m k"],
    v: Float[Array, "groups g m k"],
    scale: float,
) -> Float[Array, "groups blocks g n k"]:
    """Attention of every block of queries to the keys of its group."""
    return forward(q, k, v, scale)[0]


def forward(q, k, v, scale):
    # Remat keeps both under this name: without either it would attend twice.
    outputs = with_totals(q, k, v, scale)
    out, total = (checkpoint_name(x, "attention") for x in outputs)
    return out, (q, k, v, out, total)


def with_totals(q, k, v, scale, keys=None):
    """Outputs and log-denominators of grouped queries, keys and values; of the keys
    only the first `keys` count, if it is a number."""

    def group(qkv):
        q, k, v = qkv
        # map is a loop: one block's logits exist at a time.
        return jax.lax.map(lambda q: block(q, k, v, scale, keys), q)

    return jax.lax.map(group, (q, k, v))


def block(q, k, v, scale, keys=None):
    """(output (g, n, k), log of the softmax's denominator (g, n, 1) in float32)."""
    logits = product("gnk,gmk->gnm", q, k)
    if keys is not None:
        logits = jnp.where(jnp.arange(k.shape[1]) < keys, logits, MASKED)
    top = jnp.max(logits, -1, keepdims=True)  # so that exp does not overflow
    weights = jnp.exp(scale * (logits - top))
    total = jnp.sum(weights, -1, keepdims=True)
    # Divided after the product: n k divisions instead of n m.
    out = product("gnm,gmk->gnk", weights.astype(v.dtype), v) / total
    return out.astype(q.dtype), scale * top + jnp.log(total)


def backward(scale, residuals, dout):
    """Gradients of q, k and v; sums over blocks of queries are float32."""
    dq, dk, dv = gradients(scale, residuals, dout)
    _, k, v, _, _ = residuals
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def gradients(scale, residuals, dout, keys=None):
    """`backward` with float32 gradients of k and v. `out` and `total` of the residuals
    may be those of more keys than k, of which these are a part."""

    def group(arrays):
        q, k, v, out, total, dout = arrays

        def one(sums, arrays):
            q, out, total, dout = arrays
            # The softmax again, normalised by the saved denominator.
            weights = jnp.exp(scale * product("gnk,gmk->gnm", q, k) - total)
            if keys is not None:
                weights = jnp.where(jnp.arange(k.shape[1]) < keys, weights, 0.0)
            dv = product("gnm,gnk->gmk", weights.astype(v.dtype), dout)
            dweights = product("gnk,gmk->gnm", dout, v)
            # softmax's Jacobian: dlogits = w (dw - sum w dw), whose sum is out dout.
            delta = out.astype(jnp.float32) * dout.astype(jnp.float32)
            dweights = dweights - jnp.sum(delta, -1, keepdims=True)
            dlogits = (scale * weights * dweights).astype(q.dtype)
            dk = product("gnm,gnk->gmk", dlogits, q)
            dq = product("gnm,gmk->gnk", dlogits, k).astype(q.dtype)
            return (sums[0] + dk, sums[1] + dv), dq

        zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
        sums, dq = jax.lax.scan(one, zeros, (q, out, total, dout))
        return dq, *sums

    return jax.lax.map(group, (*residuals, dout))


attend.defvjp(forward, backward)


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
