"""Look inside the denoiser: norms of its blocks and attention from image to text."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Float, Int

from sd3_jax.data import prompt_weights
from sd3_jax.errors import UserError
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.scan import OBSERVED
from sd3_jax.params import adapters
from sd3_jax.sampling import compiled
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.text.prompt_tokens import Prompt
from sd3_jax.sampling.text.prompts import CLIP_LENGTH

WORD = re.compile(r"\w+(?:['’-]\w+)*")


class Observation(NamedTuple):
    """What the denoiser's blocks do at one time t; layers come first to last.

    `attention` is each image token's attention to each text token, the mean over heads:
    the first 77 text tokens are CLIP's, the others T5's. `image_rms` and `text_rms` are
    the root mean square of each stream after a block; the last block has no text.
    """

    velocity: Float[Array, "b h w c"]
    attention: Float[Array, "layers b rows columns text"]
    image_rms: Float[Array, "layers b"]
    text_rms: Float[Array, "layers-1 b"]


def observe(
    bundle: Bundle,
    latents: Float[Array | np.ndarray, "b h w c"],
    t: Float[Array | np.ndarray, " b"],
    context: Float[Array | np.ndarray, "b l k"],
    pooled: Float[Array | np.ndarray, "b e"],
) -> Observation:
    """The velocity at (latents, t), as Bundle.velocity, and what the blocks did.

    Raises UserError for a denoiser that is not an MMDiT of two streams.
    """
    denoiser = bundle.part("denoiser")
    if not isinstance(denoiser, MMDiT) or denoiser.weight_sets != 2:
        raise UserError(
            f"{bundle.source}: only an MMDiT with an image and a text stream can be"
            " observed"
        )
    args = bundle.evaluation_arguments(latents, t, context, pooled)
    table = bundle.bank.table(None, len(args[0]))
    variables = bundle.adapted("denoiser", table)
    with compiled.on(bundle.mesh, args):
        variables = bundle.on_devices(variables)
        return bundle.finished(_observe(denoiser, variables, *args))


@functools.partial(jax.jit, static_argnames="denoiser")
def _observe(denoiser: nn.Module, variables, x, t, context, pooled) -> Observation:
    velocity, state = denoiser.apply(
        adapters.attached(variables), x, t, context, pooled, mutable=[OBSERVED]
    )
    # A scanned stack has its layers in front; the last block is one layer.
    stacks = {name: _values(part) for name, part in state[OBSERVED].items()}
    last = jax.tree.map(lambda x: x[None], stacks.pop("last_block"))
    scanned = [stacks[name] for name in ("dual_blocks", "blocks") if name in stacks]
    join = lambda name: jnp.concatenate([x[name] for x in (*scanned, last)])
    attention = join("attention")  # (layers, b, n, l)
    rows, columns = x.shape[1] // denoiser.patch, x.shape[2] // denoiser.patch
    sides = (*attention.shape[:2], rows, columns, attention.shape[-1])
    rms = [x["rms"] for x in scanned]  # (layers, b, 2) each
    image = jnp.concatenate([*(x[..., 0] for x in rms), last["rms"][..., 0]])
    # The last block's text stream ends before its MLP, and has no output to measure.
    text = jnp.concatenate([x[..., 1] for x in rms])
    return Observation(velocity, attention.reshape(sides), image, text)


def _values(part: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a stack; flax keeps a tuple with one for each call."""
    return {name: values[0] for name, values in part.items()}


# --- text tokens by word


def word_tokens(
    bundle: Bundle,
    prompt: str | Prompt,
    length: int,
    *,
    weighting: str | None = None,
) -> dict[str, dict[str, list[int]]]:
    """For each encoder and word of its text, the word's tokens in the context.

    CLIP-L's and CLIP-G's tokens share places 0 to 76; T5's come after them. `length`
    and `weighting` are those of encode_prompts. Words that an encoder does not read
    have no token there.
    """
    tokens = bundle.tokenize([prompt], length, weighting=weighting)
    places = {}
    for name, words in tokens.words.items():
        text = without_weights(tokens.texts[name][0], weighting)
        first = CLIP_LENGTH if name == "t5" else 0
        pieces = _pieces(bundle.tokenizers[name], words.ids[0])
        places[name] = _by_word(words_of(text), pieces, first)
    return places


def without_weights(prompt: str, weighting: str | None) -> str:
    """A prompt without the marks of its weights."""
    return prompt if weighting is None else prompt_weights.parse(prompt, weighting).text


def words_of(text: str) -> list[str]:
    """The words of a text in order, in lower case, repeated ones too."""
    return [match[0].lower() for match in WORD.finditer(text)]


def _pieces(tokenizer: Any, ids: Int[np.ndarray, " l"]) -> list[str]:
    """The text of each token in lower case; "" for those of no word."""
    marks = {*tokenizer("")["input_ids"], tokenizer.pad_token_id}
    text = lambda i: "" if i in marks else tokenizer.decode([i]).strip().lower()
    # Not by the tokenizer's offsets: placeholders and weighted prompts have none.
    return [text(int(i)) for i in ids]


def _by_word(words: Sequence[str], pieces: Sequence[str], first: int) -> dict:
    """Token numbers, counted from `first`, of the pieces that spell each word."""
    spelled = "".join(pieces)
    owner = [i for i, piece in enumerate(pieces) for _ in piece]  # of each letter
    by_word: dict[str, list[int]] = {}
    at = 0
    for word in words:
        tokens = by_word.setdefault(word, [])
        start = spelled.find(word, at)
        if start < 0:  # truncated, or letters that the tokenizer does not know
            continue
        at = start + len(word)
        tokens.extend(first + i for i in dict.fromkeys(owner[start:at]))
    return by_word
