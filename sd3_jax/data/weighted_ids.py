"""Token ids of weighted prompts, with a weight and a piece's number for each token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sd3_jax.data import truncation
from sd3_jax.data.prompt_weights import WeightedPrompt
from sd3_jax.data.truncation import Cut

NO_PIECE = -1  # the start and end of a text, and padding


class WeightedIds(NamedTuple):
    """For b prompts of l tokens: ids, weights, and the number of each token's piece.

    `pieces` is NO_PIECE where a token belongs to none.
    """

    ids: Int[np.ndarray, "b l"]
    weights: Float[np.ndarray, "b l"]
    pieces: Int[np.ndarray, "b l"]


def weighted_ids(
    tokenizer: Any, prompts: Sequence[WeightedPrompt], length: int
) -> tuple[WeightedIds, list[Cut | None]]:
    """Pieces are tokenized by themselves and joined, as in ComfyUI and compel.

    A prompt whose weights are all 1 is tokenized as a whole.
    """
    texts = [prompt.text for prompt in prompts]
    ids, cuts = truncation.cut_ids(tokenizer, texts, length)
    # The start, the end and the padding have weight 1, as in ComfyUI.
    weights = np.ones(ids.shape, np.float32)
    pieces = np.full(ids.shape, NO_PIECE, np.int32)
    with truncation.LOCK:
        for row, prompt in enumerate(prompts):
            if prompt.is_plain:
                continue
            *prefix, end = tokenizer("")["input_ids"]
            tokens = [
                (i, piece.weight, number)
                for number, piece in enumerate(prompt.pieces)
                for i in _inner_ids(tokenizer, piece.text, len(prefix))
            ]
            # What is kept beside the start and the end of a text.
            room = length - len(prefix) - 1
            cuts[row] = truncation.unread(tokenizer, [i for i, _, _ in tokens[room:]])
            body = tokens[:room]
            first, last = len(prefix), len(prefix) + len(body)
            padding = [tokenizer.pad_token_id] * (length - last - 1)
            ids[row] = [*prefix, *(i for i, _, _ in body), end, *padding]
            weights[row, first:last] = [weight for _, weight, _ in body]
            pieces[row, first:last] = [number for _, _, number in body]
    return WeightedIds(ids, weights, pieces), cuts


def _inner_ids(tokenizer: Any, text: str, prefix: int) -> list[int]:
    """A piece's ids without the start and end of a text."""
    # Spaces at a piece's ends belong to the syntax; T5 would make tokens of them.
    words = " ".join(text.split())
    return tokenizer(words, verbose=False)["input_ids"][prefix:-1] if words else []
