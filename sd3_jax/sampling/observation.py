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
from jaxtyping import Float

from sd3_jax.errors import UserError
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.scan import OBSERVED
from sd3_jax.params import adapters
from sd3_jax.sampling import compiled, input_images
from sd3_jax.sampling.bundle import TEXT, Bundle
from sd3_jax.sampling.prompts import CLIP_LENGTH

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
    latents = input_images.laid_out(latents, denoiser.channels)
    t = input_images.times(t, len(latents))
    # One batch and no guidance: the rows of the result are those of the caller.
    args = compiled.place((latents, t, context, pooled), bundle.mesh)
    # The weights of set_adapters, as an unchanged call of generate has them.
    table = bundle.bank.table(None, len(latents))
    variables = bundle.adapted("denoiser", table)
    with compiled.on(bundle.mesh, args):
        return _observe(denoiser, variables, *args)


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


def words_of(text: str) -> list[str]:
    """The words of a prompt, each once, in order, in lower case."""
    return list(dict.fromkeys(match[0].lower() for match in WORD.finditer(text)))


def word_tokens(
    bundle: Bundle, text: str, length: int
) -> dict[str, dict[str, list[int]]]:
    """For each encoder and word of a prompt, the word's text tokens in the context.

    CLIP-L's and CLIP-G's tokens share places 0 to 76; T5's come after them, up to
    `length`. Words beyond an encoder's length have no token.
    """
    places = {}
    for name in TEXT:
        if name not in bundle.modules or name not in bundle.tokenizers:
            continue
        tokenizer = bundle.tokenizers[name]
        first, most = (CLIP_LENGTH, length) if name == "t5" else (0, CLIP_LENGTH)
        # The tokenizer's own spans: words and tokens do not match one to one in any of
        # the three.
        spans = tokenizer(
            text, return_offsets_mapping=True, truncation=True, max_length=most
        )["offset_mapping"]
        places[name] = _by_word(text, spans, first)
    return places


def _by_word(text: str, spans: Sequence[tuple[int, int]], first: int) -> dict:
    """Token numbers, counted from `first`, of each word that their spans overlap."""
    by_word: dict[str, list[int]] = {}
    for match in WORD.finditer(text):
        start, stop = match.span()
        # Special tokens have empty spans.
        tokens = [i for i, (a, b) in enumerate(spans) if max(a, start) < min(b, stop)]
        by_word.setdefault(match[0].lower(), []).extend(first + i for i in tokens)
    return by_word
