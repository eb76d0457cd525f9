"""Prompts to the token ids of each encoder, with weights, and what is cut of them."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sd3_jax.data import prompt_text, prompt_weights, truncation, weighted_ids
from sd3_jax.data.truncation import Cut
from sd3_jax.data.weighted_ids import WeightedIds
from sd3_jax.errors import UserError
from sd3_jax.sampling import argument_checks

TEXT = ("clip_l", "clip_g", "t5")
KINDS = {"clip_l": "CLIP", "clip_g": "CLIP", "t5": "T5"}  # for messages
LONGEST = 512  # tokens of T5
REMEMBERED = 100_000  # cut texts that are remembered as logged, at most


class Prompt(NamedTuple):
    """A text for each encoder; None stands for the text of clip_l."""

    clip_l: str
    clip_g: str | None = None
    t5: str | None = None


class PromptTokens(NamedTuple):
    """By encoder: ids with weights, and for each text its Cut or None."""

    words: dict[str, WeightedIds]
    cuts: dict[str, list[Cut | None]]
    texts: dict[str, list[str]]

    @property
    def ids(self) -> dict[str, Int[np.ndarray, "b _"]]:
        return {f"ids_{name}": x.ids for name, x in self.words.items()}

    @property
    def is_weighted(self) -> bool:
        return any((x.weights != 1).any() for x in self.words.values())

    def by_kind(self) -> dict[str, dict[str, Cut | None]]:
        """Cuts by text for "CLIP" and "T5". Both CLIPs cut the same words of a text,
        which counts once."""
        kinds: dict[str, dict[str, Cut | None]] = {}
        for name, cuts in self.cuts.items():
            cut_of = kinds.setdefault(KINDS[name], {})
            for text, cut in zip(self.texts[name], cuts):
                cut_of[text] = cut_of.get(text) or cut
        return kinds

    def count_cuts(self) -> Counter[str]:
        """How many prompts each kind of encoder cuts."""
        counts = Counter()
        for kind in dict.fromkeys(KINDS[name] for name in self.cuts):
            # A prompt whose texts for CLIP-L and CLIP-G are both cut counts once.
            rows = zip(*(x for name, x in self.cuts.items() if KINDS[name] == kind))
            counts[kind] = sum(any(row) for row in rows)
        return counts

    def log_cuts(self, logged: set[tuple[str, str]]) -> None:
        """One line for CLIP and one for T5, of texts that are not yet in `logged`."""
        lengths = {KINDS[name]: x.ids.shape[1] for name, x in self.words.items()}
        for kind, cuts in self.by_kind().items():
            cuts = {text: x for text, x in cuts.items() if (kind, text) not in logged}
            truncation.log_cuts(kind, lengths[kind], cuts)
            # Jobs encode their negative prompt with every batch.
            if len(logged) < REMEMBERED:
                logged |= {
                    (kind, text) for text, cut in cuts.items() if cut is not None
                }


def tokenized(
    by_encoder: Mapping[str, Any],
    lengths: Mapping[str, int],
    prompts: Sequence[str | Prompt],
    *,
    weighting: str | None = None,
    source: str = "",
) -> PromptTokens:
    """Tokens of the encoders in `lengths` by the tokenizers `by_encoder`.

    `weighting` is one of prompt_weights.SYNTAXES; None leaves brackets as text. Raises
    UserError for a tokenizer that `source` lacks, and for weights that do not parse.
    """
    check_weighting(weighting)
    full = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
    words, cuts, texts = {}, {}, {}
    for name, length in lengths.items():
        # Only encoders that are asked for: embeddings alone need no tokenizer at all.
        if name not in by_encoder:
            raise UserError(
                f"{source} has no tokenizer for {name}; set"
                " tokenizers_from=FOLDER, a diffusers folder or a hub name"
            )
        at = TEXT.index(name)
        texts[name] = [
            prompt_text.checked(p.clip_l if p[at] is None else p[at]) for p in full
        ]
        read = weighted_ids.weighted_ids
        parsed = [_parsed(text, weighting) for text in texts[name]]
        words[name], cuts[name] = read(by_encoder[name], parsed, length)
    return PromptTokens(words, cuts, texts)


def check_weighting(weighting: str | None) -> None:
    if weighting is not None:
        choices = list(prompt_weights.SYNTAXES)
        argument_checks.choice("prompt_weighting", weighting, choices)


def _parsed(text: str, weighting: str | None) -> prompt_weights.WeightedPrompt:
    if weighting is None:
        # No pieces: is_plain, so that the whole text is tokenized as ever.
        return prompt_weights.WeightedPrompt(text, ())
    return prompt_weights.parse(text, weighting)


def lengths(
    encoders: Collection[str], configs: Mapping[str, dict], length: int
) -> dict[str, int]:
    """Number of tokens by encoder. CLIP's is the size of its position table; T5 has
    relative positions and reads `length`."""
    argument_checks.whole("max_sequence_length", length, 1, LONGEST)
    places = "max_position_embeddings"
    return {
        name: length if name == "t5" else configs[name][places]
        for name in TEXT
        if name in encoders
    }
