"""What the text says, as the denoiser wants it: one context and one pooled vector."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Key


class Conditioning(NamedTuple):
    """`context` (b, l, k), attended to; `pooled` (b, e), added to the time."""

    context: Float[Array, "b l k"]
    pooled: Float[Array, "b e"]


class Part(NamedTuple):
    """What one text encoder contributes: tokens and channels of context, and pooled."""

    tokens: slice
    channels: slice
    pooled: slice


ALL = slice(None)
LAYOUTS = {
    "bytes": (Part(ALL, ALL, ALL),),
    # 77 tokens of CLIP-L beside CLIP-G on channels, then T5's, which has no pooled.
    "sd3": (
        Part(slice(0, 77), slice(0, 768), slice(0, 768)),
        Part(slice(0, 77), slice(768, 2048), slice(768, 2048)),
        Part(slice(77, None), ALL, slice(0, 0)),
    ),
}


def null(cond: Conditioning) -> Conditioning:
    """No text at all: what a dropped encoder leaves is zeros, not an empty prompt."""
    return jax.tree.map(jnp.zeros_like, cond)


def drop(
    key: Key[Array, ""], cond: Conditioning, *, rate: float, layout: str
) -> Conditioning:
    """Each encoder of each example zeroed with probability `rate` (sec. 5.3.3)."""
    parts = LAYOUTS[layout]
    kept = jax.random.bernoulli(key, 1 - rate, (cond.pooled.shape[0], len(parts)))
    context, pooled = cond
    for part, keep in zip(parts, jnp.unstack(kept.astype(pooled.dtype), axis=1)):
        at = (ALL, part.tokens, part.channels)
        context = context.at[at].multiply(keep[:, None, None].astype(context.dtype))
        pooled = pooled.at[:, part.pooled].multiply(keep[:, None])
    return Conditioning(context, pooled)


class TextModel(NamedTuple):
    """How a batch becomes a Conditioning, and what of that trains.

    `init(key, batch)` gives the parameters, {} for text that is encoded already.
    """

    layout: str
    init: Callable[[Array, dict], dict]
    encode: Callable[[dict, dict], Conditioning]


def precomputed() -> TextModel:
    """Context and pooled come with the batch."""
    encode = lambda params, batch: Conditioning(batch["context"], batch["pooled"])
    return TextModel("sd3", lambda key, batch: {}, encode)


def trained(tower: nn.Module) -> TextModel:
    """A small tower on bytes, trained with the denoiser."""
    init = lambda key, batch: tower.init(key, batch["ids_bytes"])["params"]
    encode = lambda params, batch: Conditioning(
        *tower.apply({"params": params}, batch["ids_bytes"])
    )
    return TextModel("bytes", init, encode)
