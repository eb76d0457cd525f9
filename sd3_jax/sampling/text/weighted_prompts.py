"""Weights of tokens, applied to the encoders' states as ComfyUI and compel do.

"parentheses" is ComfyUI's rule (comfy/sd1_clip.py, encode_token_weights): a token's
state z becomes e + w (z - e), with e the state of the empty prompt at its place.
"compel" does the same and, for each piece with w < 1, blends in the states of the
prompt with that piece masked out, by tan((1 - w) pi / 2) to 1
(compel/embeddings_provider.py). The pooled vector has no weights in either.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from sd3_jax.data.weighted_ids import WeightedIds
from sd3_jax.params import adapters
from sd3_jax.sampling.text import prompts
from sd3_jax.sampling.text.prompts import Conditioning, Output, TextModels

LEAST = 1e-5  # of a piece's weight in a blend: tan would be infinite at 0
Masks = dict[str, Bool[np.ndarray, "b _"]]
Shares = dict[str, Float[np.ndarray, " b"]]


def encode(
    models: TextModels,
    variables: dict,
    words: dict[str, WeightedIds],
    empty: dict[str, WeightedIds],
    weighting: str,
    *,
    place: Callable[[Any], Any],
    clip_skip: int,
    context_dim: int,
    pooled_dim: int,
    length: int,
) -> Conditioning:
    """The Conditioning of weighted prompts; `empty` are the words of b empty prompts.

    `place` puts host arrays onto the mesh.
    """
    ids = place({f"ids_{name}": x.ids for name, x in words.items()})
    empty_ids = place({f"ids_{name}": x.ids for name, x in empty.items()})
    weights = place({name: x.weights for name, x in words.items()})
    outputs: dict[str, Output] = {}
    # A round is the program once more: their number is no shape of it.
    for masks, shares in blend_rounds(words) if weighting == "compel" else [(None, {})]:
        weighed = states(
            models,
            variables,
            ids,
            empty_ids,
            weights,
            None if masks is None else place(masks),
            clip_skip=clip_skip,
        )
        for name, output in weighed.items():
            share = place(shares[name])[:, None, None] if shares else 1.0
            state = share * output.states
            if name in outputs:  # pooled is that of the first round
                output = outputs[name]._replace(states=outputs[name].states + state)
            else:
                output = output._replace(states=state)
            outputs[name] = output
    # Rounded once, after the sums, to what the plain program returns.
    dtypes = {name: getattr(models, name).dtype for name in outputs}
    outputs = {
        name: output._replace(states=output.states.astype(dtypes[name]))
        for name, output in outputs.items()
    }
    encoded = prompts.side_by_side(models, outputs, pooled_dim=pooled_dim)
    return prompts.put_together(*encoded, length=length, context_dim=context_dim)


def blend_rounds(
    words: dict[str, WeightedIds],
) -> list[tuple[Masks | None, Shares]]:
    """Masks and shares of the prompts without each of their pieces of weight < 1.

    The first round masks nothing. A prompt with fewer such pieces than another has a
    share of 0 in the rest.
    """
    light = {name: _light_pieces(x) for name, x in words.items()}
    rounds = max((len(row) for rows in light.values() for row in rows), default=0)
    if not rounds:
        return [(None, {})]
    masks: list[Masks] = [
        {name: np.ones(x.ids.shape, bool) for name, x in words.items()}
        for _ in range(rounds + 1)
    ]
    shares = {
        name: np.zeros((rounds + 1, len(x.ids)), np.float64)
        for name, x in words.items()
    }
    for name, x in words.items():
        shares[name][0] = 1
        for row, pieces in enumerate(light[name]):
            for i, (number, weight) in enumerate(pieces, 1):
                # NO_PIECE differs from every number: the start, the end and padding
                # stay visible.
                masks[i][name][row] = x.pieces[row] != number
                angle = (1 - max(LEAST, weight)) * np.pi / 2
                shares[name][i, row] = np.tan(angle)
        # compel's lerp: the shares of a blend add up to 1.
        shares[name] /= shares[name].sum(0)
    return [
        (masks[i], {name: x[i].astype(np.float32) for name, x in shares.items()})
        for i in range(rounds + 1)
    ]


def _light_pieces(words: WeightedIds) -> list[list[tuple[int, float]]]:
    """(number, weight) of each prompt's pieces of weight < 1 that the encoder reads."""
    rows = []
    for numbers, weights in zip(words.pieces, words.weights):
        pieces = dict(zip(numbers[weights < 1], weights[weights < 1]))
        rows.append([(int(k), float(v)) for k, v in pieces.items()])
    return rows


@functools.partial(jax.jit, static_argnames=("models", "clip_skip"))
def states(
    models: TextModels,
    variables: dict,
    ids: dict[str, Array],
    empty_ids: dict[str, Array],
    weights: dict[str, Float[Array, "b _"]],
    masks: dict[str, Array] | None,
    *,
    clip_skip: int,
) -> dict[str, Output]:
    """Each encoder's states in float32, e + w (z - e); z itself where w is 1."""
    variables = {name: adapters.attached(x) for name, x in variables.items()}
    # Each prompt has its own empty one, in one batch of 2b: adapters may differ by row.
    doubled = jax.tree.map(lambda x, e: jnp.concatenate([x, e]), ids, empty_ids)
    if masks is not None:
        masks = {k: jnp.concatenate([x, jnp.ones_like(x)]) for k, x in masks.items()}
    outputs = prompts.run_encoders(
        models, variables, doubled, masks, clip_skip=clip_skip
    )

    def weigh(output, w):
        z, e = jnp.split(output.states.astype(jnp.float32), 2)
        w = w[..., None]  # (b, l, 1)
        # Of the prompt's half; the empty prompt's is not used.
        pooled = None if output.pooled is None else jnp.split(output.pooled, 2)[0]
        # Selected, since e + (z - e) rounds: words of weight 1 keep their states.
        return Output(jnp.where(w == 1, z, e + w * (z - e)), pooled)

    return {name: weigh(output, weights[name]) for name, output in outputs.items()}
