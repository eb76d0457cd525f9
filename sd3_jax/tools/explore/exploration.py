"""What the denoiser did in the making of one picture, at a few moments of it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from sd3_jax.errors import UserError
from sd3_jax.sampling import observation
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.latents import to_rgb
from sd3_jax.sampling.text.prompt_tokens import Prompt
from sd3_jax.sampling.text.prompts import CLIP_LENGTH, Conditioning

# Encoders that share the context's first tokens and, after them, T5's.
GROUPS = {"CLIP": slice(0, CLIP_LENGTH), "T5": slice(CLIP_LENGTH, None)}
MOST_WORDS = 12  # of a prompt, with a map each


class Moment(NamedTuple):
    """One step of the sampling: the time before it, and what the blocks did there.

    `words` has each word's attention map, the mean over blocks and heads, and `shares`
    the share of the image's attention that goes to each group of text tokens, by block.
    """

    step: int
    t: float
    estimate: UInt8[ndarray, "H W 3"]  # the picture x0 = x - t v that v points to
    image_rms: Float[ndarray, " layers"]
    text_rms: Float[ndarray, " layers-1"]
    words: dict[str, Float[ndarray, "rows columns"]]
    shares: dict[str, Float[ndarray, " layers"]]


def moments_of(steps: int, count: int) -> list[int]:
    """`count` steps of 0 … steps - 1, evenly spaced, the first and the last among
    them; all of them if there are fewer."""
    spaced = np.linspace(0, steps - 1, min(count, steps))
    return sorted({int(i) for i in np.rint(spaced)})


def previews(
    latents: Float[ndarray, "n h w c"], times: Float[ndarray, " n"]
) -> list[tuple[int, float, UInt8[ndarray, "h w 3"]]]:
    """(steps taken, t, rough picture) of latents in the order of sampling."""
    rgb = np.asarray(to_rgb(jnp.asarray(latents)))
    pictures = np.rint(255 * rgb).astype(np.uint8)
    return [(i, float(t), x) for i, (t, x) in enumerate(zip(times, pictures))]


def tokens_of(
    bundle: Bundle,
    prompt: str | Prompt,
    words: Sequence[str],
    length: int,
    *,
    weighting: str | None = None,
) -> dict[str, list[int]]:
    """The text tokens of each word of a prompt, over all encoders.

    `words` are the words to look at, () for the first MOST_WORDS of the prompt. Raises
    UserError for a word that is not in the prompt, or that all encoders truncate.
    """
    by_encoder = observation.word_tokens(bundle, prompt, length, weighting=weighting)
    # Encoders may have texts of their own.
    present = list(dict.fromkeys(word for x in by_encoder.values() for word in x))
    absent = [word for word in words if word.lower() not in present]
    if absent:
        raise UserError(
            f'config.explore.words: "{absent[0]}" is not a word of the prompt; expected'
            f" some of {', '.join(present[:MOST_WORDS])}"
        )
    tokens = {}
    for word in [word.lower() for word in words] or present[:MOST_WORDS]:
        # CLIP-L and CLIP-G number the same tokens, which count once.
        places = {i for by_word in by_encoder.values() for i in by_word.get(word, ())}
        if places:
            tokens[word] = sorted(places)
        elif words:
            raise UserError(
                f'config.explore.words: "{word}" is beyond the tokens that the text'
                " encoders read; shorten the prompt or raise config.sample.max_length"
            )
    return tokens


def moment(
    bundle: Bundle,
    latents: Float[ndarray, "1 h w c"],
    step: int,
    t: float,
    cond: Conditioning,
    tokens: Mapping[str, Sequence[int]],
) -> Moment:
    """Observe the denoiser with a prompt alone, without its unconditional half."""
    # The conditional half alone: its attention is what the words did, and guidance
    # needs no second look.
    seen = observation.observe(bundle, latents, np.full(1, t, np.float32), *cond)
    estimate = bundle.decode(latents - np.float32(t) * seen.velocity)
    attention = np.asarray(seen.attention)[:, 0]  # (layers, rows, columns, text)
    # Heads are averaged in the program already; blocks here, for the maps alone.
    maps = attention.mean(0)
    shares = {
        # Shares of one softmax over image and text: what is missing to 1 is attention
        # among image tokens.
        group: attention[..., part].sum(-1).mean((1, 2))
        for group, part in GROUPS.items()
        if attention[..., part].shape[-1]
    }
    return Moment(
        step,
        float(t),
        np.rint(255 * np.asarray(estimate[0], np.float32)).astype(np.uint8),
        np.asarray(seen.image_rms)[:, 0],
        np.asarray(seen.text_rms)[:, 0],
        {word: maps[..., list(places)].sum(-1) for word, places in tokens.items()},
        shares,
    )
