"""Attention whose keys and values go round a ring of devices (Liu et al. 2023).

A device holds its share of the image's keys and values, and of those that pass it the
share of one other device. The softmax is merged from the parts' log-denominators.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from sd3_jax.distributed import mesh_context
from sd3_jax.models.attention import chunked
from sd3_jax.models.attention import splash as tpu


class Ring(NamedTuple):
    """What is static of a ring: `tokens` image tokens over `devices` of `axes`."""

    axes: tuple[str, ...]
    devices: int
    tokens: int
    scale: float
    limit: int  # bytes of logits, where the kernel is XLA's
    splash: bool
    way: int = 1  # 1 or -1, the neighbour that arrays are passed to

    def turned(self, arrays: Sequence[Array]) -> list[Array]:
        """Each device's arrays, on the next device."""
        pairs = [(i, (i + self.way) % self.devices) for i in range(self.devices)]
        return [jax.lax.ppermute(x, self.axes, pairs) for x in arrays]

    def keys(self, turn: int, share: int, text: int) -> int | Array:
        """How many of the `text` + `share` keys at hand are real.

        The last devices' shares end in padding.
        """
        if share * self.devices == self.tokens:
            return text + share
        # After `turn` passes a device holds what began that many places before it.
        home = (jax.lax.axis_index(self.axes) - self.way * turn) % self.devices
        return text + jnp.clip(self.tokens - home * share, 0, share)


def ring(
    qs: Sequence[Array],
    ks: Sequence[Array],
    vs: Sequence[Array],
    *,
    scale: float,
    limit: int,
    splash: bool,
) -> list[Array]:
    """joint_attention of streams whose tokens lie over the mesh's "tokens" axes.

    The first of `ks` and `vs` are the image's, which are passed on; those of text are
    few, and every device gets all of them. Queries stay where they are.
    """
    (parts,), axes = mesh_context.parts("tokens"), mesh_context.mesh_axes("tokens")
    cut = mesh_context.along_tokens(ks[0].shape)
    replicated = PartitionSpec(cut[0], None, cut[2])
    static = Ring(axes, parts, ks[0].shape[1], scale, limit, splash)

    def local(qs, k, v, text_k, text_v):
        arrays = jnp.concatenate(qs, axis=1), k, v, text_k, text_v
        # Half of the heads go one way and half the other: a link carries both ways.
        # One head alone goes one way: the other half is empty, and dropped below.
        half = [k.shape[2] // 2]
        halves = zip(*(jnp.split(x, half, axis=2) for x in arrays))
        ways = static, static._replace(way=-1)
        by_way = [attend(*x, way) for x, way in zip(halves, ways) if x[0].size]
        out = jnp.concatenate(by_way, axis=2)
        ends = np.cumsum([q.shape[1] for q in qs])
        return jnp.split(out, ends[:-1], axis=1)

    queries, (k, v) = padded(qs, parts), padded((ks[0], vs[0]), parts)
    none = [ks[0][:, :0]]
    texts = [jnp.concatenate([*x[1:]] or none, axis=1) for x in (ks, vs)]
    outputs = jax.shard_map(
        local,
        in_specs=([cut] * len(qs), cut, cut, replicated, replicated),
        out_specs=[cut] * len(qs),
        # A Pallas kernel does not say over which axes its results vary.
        check_vma=False,
    )(queries, k, v, *texts)
    return [out[:, : q.shape[1]] for out, q in zip(outputs, qs)]


def padded(arrays: Sequence[Array], parts: int) -> list[Array]:
    """The arrays with zeros up to a multiple of `parts` tokens."""
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % parts), (0, 0), (0, 0)))
    return [pad(x) for x in arrays]


# custom_vjp: autodiff through the loop would keep each turn's keys and values, and so
# all of them on every device.
@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(q, k, v, text_k, text_v, static: Ring) -> Array:
    """One device's queries (b, n, a, k), to its own, the text's and all others' keys.

    The backward pass sends keys, values and their gradients round once more.
    """
    return forward(q, k, v, text_k, text_v, static)[0]


def forward(q, k, v, text_k, text_v, static: Ring):
    share, text = k.shape[1], text_k.shape[1]
    passed, partials = [k, v], []
    for turn in range(static.devices):
        # Sent before it is attended to, so that the transfer runs beside the products.
        following = static.turned(passed) if turn + 1 < static.devices else passed
        at_hand = passed
        if turn == 0:  # text first: padding is at the end
            at_hand = joined((text_k, k), (text_v, v))
        keys = static.keys(turn, share, text if turn == 0 else 0)
        partials.append(partial(q, *at_hand, keys, static))
        passed = following
    out, total = merged(partials, q.dtype)
    # Named for remat's policy: without both, the backward pass would attend again.
    out, total = checkpoint_name(out, "attention"), checkpoint_name(total, "attention")
    return out, (q, k, v, text_k, text_v, out, total)


def backward(static: Ring, residuals, dout):
    q, k, v, text_k, text_v, out, total = residuals
    share, text = k.shape[1], text_k.shape[1]
    # float32, since every turn adds to it.
    dq = jnp.zeros(q.shape, jnp.float32)
    # The gradients of keys travel with the keys, so that each device adds its part.
    passed, text_grads = [k, v, *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))], ()
    for turn in range(static.devices):
        k, v, dk, dv = passed
        at_hand = joined((text_k, k), (text_v, v)) if turn == 0 else [k, v]
        ahead = text if turn == 0 else 0
        keys = static.keys(turn, share, ahead)
        grads = gradients(q, *at_hand, out, total, dout, keys, static)
        dq = dq + grads[0]
        # Text's keys are attended to in the first turn alone, so that they count once.
        # Their gradients are of this device's queries; shard_map's transpose sums them
        # over devices.
        if turn == 0:
            text_grads = [x[:, :text] for x in grads[1:]]
        dk, dv = dk + grads[1][:, ahead:], dv + grads[2][:, ahead:]
        # The last turn brings the gradients home.
        passed = static.turned([k, v, dk, dv])
    grads = dq, *passed[2:], *text_grads
    primals = q, k, v, text_k, text_v
    return tuple(x.astype(y.dtype) for x, y in zip(grads, primals))


attend.defvjp(forward, backward)


def joined(*pairs: Sequence[Array]) -> list[Array]:
    return [jnp.concatenate(pair, axis=1) for pair in pairs]


def partial(q, k, v, keys, static: Ring) -> tuple[Array, Array]:
    """Attention to some keys, and its log-denominators (b, n, a, 1)."""
    if static.splash:
        return tpu.with_totals(q, k, v, static.scale, keys=keys)
    blocks = chunked.blocks_of(q.shape, k.shape[1], static.limit)
    grouped = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    outputs = chunked.with_totals(*grouped, static.scale, _masked(keys))
    out, total = (blocks.restored(x, q.shape) for x in outputs)
    return out, total


def gradients(q, k, v, out, total, dout, keys, static: Ring) -> list[Array]:
    """What some keys give to the gradients of q, and their own."""
    if static.splash:
        # `out` and `total` are those of all keys: the softmax's denominators are
        # global.
        residuals = q, k, v, out, total, dout
        return tpu.gradients(*residuals, static.scale, keys=keys)
    blocks = chunked.blocks_of(q.shape, k.shape[1], static.limit)
    residuals = blocks.queries(q), blocks.keys(k), blocks.keys(v)
    residuals += blocks.queries(out), blocks.queries(total)
    args = static.scale, residuals, blocks.queries(dout), _masked(keys)
    dq, dk, dv = chunked.gradients(*args)
    # Groups of heads (groups, group, m, k) to (b, m, a, k).
    back = lambda x: x.reshape(k.shape[0], k.shape[2], *x.shape[2:]).swapaxes(1, 2)
    return [blocks.restored(dq, q.shape), back(dk), back(dv)]


def _masked(keys: int | Array) -> Array | None:
    # An int means that no key is padding: nothing has to be masked.
    return None if isinstance(keys, int) else keys


def merged(partials: Sequence[tuple[Array, Array]], dtype) -> tuple[Array, Array]:
    """The softmax over all keys, from those over parts of them; in float32."""
    # All at once: adding one after another would read and write float32 sums each time.
    # log sum exp of the parts' logs: exp of the logits themselves could overflow.
    total = functools.reduce(jnp.logaddexp, [total for _, total in partials])
    out = sum(x.astype(jnp.float32) * jnp.exp(part - total) for x, part in partials)
    return out.astype(dtype), total
