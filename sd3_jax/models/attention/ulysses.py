"""Attention of whole sequences by heads: DeepSpeed-Ulysses (Jacobs et al. 2023).

An all-to-all gives each device all tokens of some heads, and another one takes their
outputs back to the tokens' devices.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sd3_jax.distributed import mesh_context
from sd3_jax.models.attention.ring import padded


def ulysses(
    qs: Sequence[Array],
    ks: Sequence[Array],
    vs: Sequence[Array],
    *,
    attend: Callable[..., Sequence[Array]],
) -> list[Array]:
    """attend(qs, ks, vs) of streams whose tokens lie over the mesh's "tokens" axes.

    `attend` gets whole streams of a share of the heads, which the number of devices on
    these axes must divide.
    """
    (parts,), axes = mesh_context.parts("tokens"), mesh_context.mesh_axes("tokens")
    cut = mesh_context.along_tokens(ks[0].shape)
    streams = [*qs, *ks, *vs]
    lengths = [x.shape[1] for x in streams]

    def local(streams):
        # All streams at once: one exchange before attention, and one after it.
        # Inside shard_map shapes are a device's: n/p tokens of each stream.
        sides = [x.shape[1] for x in streams]
        y = to_heads(jnp.concatenate(streams, axis=1), axes, parts)
        # Cut to the stream's length before attention: padding would take part in the
        # softmax.
        sequences = [
            x.reshape(x.shape[0], -1, *x.shape[3:])[:, :n]  # without the padding
            for x, n in zip(jnp.split(y, np.cumsum(sides)[:-1], axis=2), lengths)
        ]
        # One list of streams was exchanged; `of` deals it out to queries, keys and
        # values.
        remaining = iter(sequences)
        of = lambda xs: [next(remaining) for _ in xs]
        outputs = attend(of(qs), of(ks), of(vs))
        # Padded again to p equal shares, which the second exchange returns.
        pieces = [
            x.reshape(x.shape[0], parts, -1, *x.shape[2:])
            for x in padded(outputs, parts)
        ]
        z = to_tokens(jnp.concatenate(pieces, axis=2), axes)
        return jnp.split(z, np.cumsum(sides[: len(qs)])[:-1], axis=1)

    outputs = jax.shard_map(
        local,
        in_specs=([cut] * len(streams),),
        out_specs=[cut] * len(qs),
        check_vma=False,
    )(padded(streams, parts))
    return [out[:, :n] for out, n in zip(outputs, lengths)]


def to_heads(x: Array, axes: tuple[str, ...], parts: int) -> Array:
    """(b, n/p, a, k) of all heads to (b, p, n/p, a/p, k): every device's tokens."""
    # Tiled: jax 0.10 transposes the other form with its axes in the wrong order.
    y = jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)
    return y.reshape(y.shape[0], parts, -1, *y.shape[2:])


def to_tokens(x: Array, axes: tuple[str, ...]) -> Array:
    """(b, p, n/p, a/p, k) to (b, n/p, a, k), the inverse of to_heads."""
    # Device by device in order of tokens, so that split_axis=1 cuts at the devices'
    # shares.
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
