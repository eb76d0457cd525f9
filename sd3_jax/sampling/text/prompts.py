"""Text encoders' outputs joined into the denoiser's context and pooled vector."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from sd3_jax.errors import ConfigError


class Conditioning(NamedTuple):
    """`context` (b, l, k), attended to; `pooled` (b, e), added to the time."""

    context: Float[Array, "b l k"]
    pooled: Float[Array, "b e"]


class Part(NamedTuple):
    """The tokens and channels of context, and of pooled, that one encoder fills."""

    tokens: slice
    channels: slice
    pooled: slice


CLIP_LENGTH = 77  # tokens
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
    """The unconditional text: zeros, as dropout leaves, not an empty prompt."""
    return jax.tree.map(jnp.zeros_like, cond)


def nulled(cond: tuple, captioned: Bool[Array, " b"]) -> tuple:
    """`null` for the examples that have no caption: (b, ...) arrays of zeros there.

    Zeros are also what dropout leaves and what guidance starts from; an encoded empty
    prompt would be another condition.
    """

    def rows(x):
        # (b,) → (b, 1, …), to broadcast over tokens and channels
        kept = captioned.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(kept, x, jnp.zeros((), x.dtype))

    return jax.tree.map(rows, cond)


def drop(
    key: Key[Array, ""], cond: Conditioning, *, rate: float, layout: str
) -> Conditioning:
    """Each encoder of each example zeroed with probability `rate` (sec. 5.3.3)."""
    parts = LAYOUTS[layout]
    # Encoders are dropped independently, so that the model also learns to do with any
    # subset, such as without T5 (sec. 5.3.3).
    kept = jax.random.bernoulli(key, 1 - rate, (cond.pooled.shape[0], len(parts)))
    context, pooled = cond
    for part, keep in zip(parts, jnp.unstack(kept.astype(pooled.dtype), axis=1)):
        at = (ALL, part.tokens, part.channels)
        context = context.at[at].multiply(keep[:, None, None].astype(context.dtype))
        # T5's slice of pooled is empty, so that its turn changes nothing here.
        pooled = pooled.at[:, part.pooled].multiply(keep[:, None])
    return Conditioning(context, pooled)


class TextModels(NamedTuple):
    """The released text encoders; one that is left out is None, and zeros."""

    clip_l: nn.Module | None
    clip_g: nn.Module | None
    t5: nn.Module | None


class Encoded(NamedTuple):
    """Outputs of the released encoders before they are joined: CLIP-L's and CLIP-G's
    states side by side on channels, and T5's states or None."""

    clip: Float[Array, "b l d"]
    t5: Float[Array, "b m k"] | None
    pooled: Float[Array, "b e"]


class Output(NamedTuple):
    """An encoder's states (b, l, d), and a CLIP's pooled vector (b, e)."""

    states: Float[Array, "b l d"]
    pooled: Float[Array, "b e"] | None = None


Outputs = dict[str, Output]  # by encoder: clip_l, clip_g, t5


def encode_released(
    models: TextModels,
    variables: dict,
    ids: dict[str, Int[Array, "b _"]],
    *,
    clip_skip: int,
    context_dim: int,
    pooled_dim: int,
    length: int,
) -> Conditioning:
    """Token ids "ids_clip_l", "ids_clip_g", "ids_t5" to what the denoiser reads."""
    encoded = encode_parts(models, variables, ids, clip_skip, pooled_dim=pooled_dim)
    return put_together(*encoded, length=length, context_dim=context_dim)


def encode_parts(
    models: TextModels,
    variables: dict,
    ids: dict[str, Int[Array, "b _"]],
    clip_skip: int = 0,
    *,
    pooled_dim: int,
) -> Encoded:
    """Penultimate states of both CLIPs, pooled (b, pooled_dim), and T5's states.

    A CLIP that is left out is zeros. The CLIPs' states have pooled's channels, or more
    if their projections are narrower than they are.
    """
    outputs = run_encoders(models, variables, ids, clip_skip=clip_skip)
    return side_by_side(models, outputs, pooled_dim=pooled_dim)


def run_encoders(
    models: TextModels,
    variables: dict,
    ids: dict[str, Int[Array, "b _"]],
    masks: dict[str, Bool[Array, "b _"]] | None = None,
    *,
    clip_skip: int,
) -> Outputs:
    """The Output of each encoder there is; `masks` are true for keys attended to."""
    outputs = {}
    mask = lambda name: None if masks is None else masks[name]
    # L before G: the denoiser's weights fix the order of the channels.
    for name in ("clip_l", "clip_g"):
        module = getattr(models, name)
        if module is not None:
            outputs[name] = Output(
                *module.apply(
                    variables[name], ids[f"ids_{name}"], mask(name), clip_skip=clip_skip
                )
            )
    if models.t5 is not None:
        # (b, length, context_dim)
        states = models.t5.apply(variables["t5"], ids["ids_t5"], mask("t5"))
        outputs["t5"] = Output(states)
    return outputs


def side_by_side(models: TextModels, outputs: Outputs, *, pooled_dim: int) -> Encoded:
    """The CLIPs' outputs beside each other on channels, as encode_parts gives them."""
    clips = [outputs[name] for name in ("clip_l", "clip_g") if name in outputs]
    states = [output.states for output in clips]
    pooled = [output.pooled for output in clips]
    if models.clip_l is None and models.clip_g is not None:  # L's channels come first
        # G's channels lie behind L's, so L's place in front is filled with zeros.
        missing = pooled_dim - pooled[0].shape[-1]
        states.insert(0, jnp.zeros((*states[0].shape[:2], missing), states[0].dtype))
        pooled.insert(0, jnp.zeros((len(pooled[0]), missing), pooled[0].dtype))
    # With T5 alone CLIP's 77 tokens are zeros; without a mask they are attended to.
    t5 = outputs["t5"].states if "t5" in outputs else None
    if not states:
        states = [jnp.zeros((len(t5), CLIP_LENGTH, 0), models.t5.dtype)]
        pooled = [jnp.zeros((len(t5), 0), models.t5.dtype)]
    # (b, 768) and (b, 1280) → (b, 2048)
    vector = filled(jnp.concatenate(pooled, -1), pooled_dim, "pooled_dim")
    # (b, 77, 768) and (b, 77, 1280) → (b, 77, 2048)
    clip = jnp.concatenate(states, -1)
    clip = filled(clip, max(pooled_dim, clip.shape[-1]), "pooled_dim")
    return Encoded(clip, t5, vector)


def put_together(
    clip: Float[Array, "b l d"],
    t5: Float[Array, "b m k"] | None,
    pooled: Float[Array, "b e"],
    *,
    length: int,
    context_dim: int,
) -> Conditioning:
    """CLIP's tokens filled up with zeros to T5's width, then T5's (appendix B.2).

    Without T5 `length` zero tokens take their place: there is no mask, so that their
    number matters.
    """
    # (b, 77, 2048) → (b, 77, 4096)
    clip = filled(clip, context_dim, "context_dim")
    if t5 is None:
        t5 = jnp.zeros((clip.shape[0], length, context_dim), clip.dtype)
    # (b, 77 + length, context_dim)
    context = jnp.concatenate([clip, t5.astype(clip.dtype)], axis=1)
    return Conditioning(context, pooled)


def filled(x: Array, size: int, key: str) -> Array:
    """x zero-padded along its last axis to `size`; ConfigError if it is longer."""
    missing = size - x.shape[-1]
    if missing < 0:
        raise ConfigError(f"{key} {size}: the text encoders return {x.shape[-1]}")
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])


class TextModel(NamedTuple):
    """How a batch becomes a Conditioning, and the parameters that train for it.

    `init(key, batch)` gives the parameters, {} for text that is encoded already.
    """

    layout: str
    init: Callable[[Array, dict], dict]
    encode: Callable[[dict, dict], Conditioning]


def precomputed(*, length: int, context_dim: int) -> TextModel:
    """Context and pooled of the batch, or joined from the encoders' stored outputs."""

    def encode(params, batch):
        if "context" in batch:
            return Conditioning(batch["context"], batch["pooled"])
        return put_together(
            batch["clip"],
            batch.get("t5"),
            batch["pooled"],
            length=length - CLIP_LENGTH,
            context_dim=context_dim,
        )

    return TextModel("sd3", lambda key, batch: {}, encode)


def trained(tower: nn.Module) -> TextModel:
    """A small tower on bytes, trained with the denoiser; no byte at all is `null`."""
    init = lambda key, batch: tower.init(key, batch["ids_bytes"])["params"]

    def encode(params, batch):
        ids = batch["ids_bytes"]
        cond = Conditioning(*tower.apply({"params": params}, ids))
        # The tower would map an empty text to some vector; guidance needs zeros.
        return nulled(cond, jnp.any(ids != 0, axis=1))

    return TextModel("bytes", init, encode)
