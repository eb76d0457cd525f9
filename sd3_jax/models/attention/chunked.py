"""Attention in blocks of heads and queries, whose logits alone exist at a time.

The backward pass recomputes the softmax of each block from the logarithm of its
denominator, as FlashAttention does (Dao et al. 2022), in plain XLA.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from sd3_jax.distributed import mesh_context

ROWS = 256  # queries a block, at least: each block reads all keys and values


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
        b, n, heads, size = q.shape
        m = k.shape[1]
        # Whole heads first, for as many as fit; else some queries of a single head.
        group = largest_divisor(b * heads, limit // (4 * n * m))
        rows = min(n, max(ROWS, limit // (4 * group * m)))
        rows = -(-n // -(-n // rows))  # about equal blocks, so that padding is small
        blocks = -(-n // rows)

        def grouped(x):  # (groups, group, tokens, size)
            return x.swapaxes(1, 2).reshape(-1, group, x.shape[1], size)

        q = jnp.pad(grouped(q), ((0, 0), (0, 0), (0, blocks * rows - n), (0, 0)))
        q = q.reshape(-1, group, blocks, rows, size).swapaxes(1, 2)
        # (groups, blocks, group, rows, size)
        out = attend(q, grouped(k), grouped(v), scale)
        out = out.swapaxes(1, 2).reshape(b, heads, blocks * rows, size)
        return out[:, :, :n].swapaxes(1, 2)

    # Queries of padding are cut off again; keys have none, so nothing is masked.
    q = jnp.pad(q, ((0, 0), (0, -n % parts), (0, 0), (0, 0)))
    return mesh_context.on_each(local, spec)(q, k, v)[:, :n]


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
    def group(qkv):
        q, k, v = qkv
        # map is a loop: one block's logits exist at a time.
        return jax.lax.map(lambda q: block(q, k, v, scale), q)

    outputs = jax.lax.map(group, (q, k, v))
    # Remat keeps both under this name: without either it would attend twice.
    out, total = (checkpoint_name(x, "attention") for x in outputs)
    return out, (q, k, v, out, total)


def block(q, k, v, scale):
    """(output (g, n, k), log of the softmax's denominator (g, n, 1) in float32)."""
    logits = product("gnk,gmk->gnm", q, k)
    top = jnp.max(logits, -1, keepdims=True)  # so that exp does not overflow
    weights = jnp.exp(scale * (logits - top))
    total = jnp.sum(weights, -1, keepdims=True)
    # Divided after the product: n k divisions instead of n m.
    out = product("gnm,gmk->gnk", weights.astype(v.dtype), v) / total
    return out.astype(q.dtype), scale * top + jnp.log(total)


def backward(scale, residuals, dout):
    """Gradients of q, k and v; sums over blocks of queries are float32."""

    def group(arrays):
        q, k, v, out, total, dout = arrays

        def one(sums, arrays):
            q, out, total, dout = arrays
            # The softmax again, normalised by the saved denominator.
            weights = jnp.exp(scale * product("gnk,gmk->gnm", q, k) - total)
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
        return dq, *(x.astype(k.dtype) for x in sums)

    return jax.lax.map(group, (*residuals, dout))


attend.defvjp(forward, backward)


product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
