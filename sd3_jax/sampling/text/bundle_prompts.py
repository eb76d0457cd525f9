"""What a bundle does with texts: tokens, what is cut of them, textual inversion."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Int

from sd3_jax.sampling.adapters.adapter_bank import Bank
from sd3_jax.sampling.text import textual_inversion
from sd3_jax.sampling.text.prompt_tokens import Prompt, PromptTokens, lengths, tokenized
from sd3_jax.weights.embedding_files import Learned


class WithPrompts:
    """The part of Bundle that reads prompts and adds placeholders to its encoders."""

    modules: dict[str, nn.Module]
    variables: dict[str, dict]
    configs: dict[str, dict]
    tokenizers: dict[str, Any]
    mesh: Mesh
    source: str
    bank: Bank
    _memo: dict

    def token_ids(
        self,
        prompts: Sequence[str | Prompt],
        length: int,
        *,
        encoders: Collection[str] | None = None,
        cut: Counter[str] | None = None,
    ) -> dict[str, Int[np.ndarray, "b _"]]:
        """The token ids that encode_prompts reads: "ids_clip_l" and so on.

        `encoders` defaults to the bundle's; those named need not have their weights.
        Prompts that an encoder truncates are logged, or counted in `cut` by encoder.
        """
        tokens = self.tokenize(prompts, length, encoders=encoders)
        if cut is None:
            self._log_cuts(tokens)
        else:
            # Counted and not logged: precomputing reads millions of captions.
            cut.update(tokens.count_cuts())
        return tokens.ids

    def tokens_cut(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        max_sequence_length: int = 256,
        *,
        weighting: str | None = None,
        log: bool = False,
    ) -> list[dict[str, str]]:
        """For each prompt, the words that encoders do not read, by encoder.

        {} for a prompt that all read to its end. CLIP reads 77 tokens with the start
        and the end of the text, T5 `max_sequence_length` with the end. With `log` they
        are logged, as encode_prompts does for prompts that were not logged before.
        """
        prompts = [prompts] if isinstance(prompts, str | Prompt) else prompts
        tokens = self.tokenize(prompts, max_sequence_length, weighting=weighting)
        if log:
            self._log_cuts(tokens)
        return [
            {name: cuts[i].text for name, cuts in tokens.cuts.items() if cuts[i]}
            for i in range(len(prompts))
        ]

    def tokenize(
        self,
        prompts: Sequence[str | Prompt],
        length: int,
        *,
        encoders: Collection[str] | None = None,
        weighting: str | None = None,
    ) -> PromptTokens:
        """Token ids with weights, and what is cut, by encoder: see token_ids."""
        # Encoders need not be loaded to count tokens: their configurations are enough.
        read = lengths(
            self.modules if encoders is None else encoders, self.configs, length
        )
        options = dict(weighting=weighting, source=self.source)
        return tokenized(self.tokenizers, read, prompts, **options)

    def _log_cuts(self, tokens: PromptTokens) -> None:
        # Remembered in the bundle: a job encodes the same negative prompt in every
        # batch.
        tokens.log_cuts(self._memo.setdefault("logged", set()))

    def load_embedding(
        self,
        path_or_hub_name: Any,
        token: Any = None,
    ) -> Any:
        """A bundle with an embedding of textual inversion, which shares all weights.

        A prompt that has the placeholder, or embedding:PLACEHOLDER, gets the vectors.
        The placeholder is that of the file, or its name, or the text `token`; a list of
        them names the vectors one by one. The next call compiles the encoders, whose
        tables have more rows, in multiples of 32. `save` refuses the bundle. Raises
        UserError for pickles, other files, vectors of another width and a placeholder
        that is taken.
        """
        widths = textual_inversion.widths_of(self.configs, self.modules)
        source = textual_inversion.path_text(path_or_hub_name)
        return self.add_learned(*textual_inversion.opened(source, token, widths))

    def add_learned(self, *learned: Learned) -> Any:
        """load_embedding for vectors that are read."""
        # New dictionaries around the same arrays: the old bundle goes on as it was.
        parts = textual_inversion.Encoders(
            self.modules, self.variables, self.tokenizers
        )
        for vectors in learned:
            parts = textual_inversion.with_embedding(parts, vectors, self.mesh)
        # A bank of its own: adapters that are loaded later act in one bundle alone.
        bank = Bank(
            dict(self.bank.adapters), dict(self.bank.weights), dict(self.bank.files)
        )
        fields = parts._asdict() | {"bank": bank, "_memo": {}}
        return dataclasses.replace(self, **fields)

    @property
    def embeddings(self) -> dict[str, dict[str, int]]:
        """The number of vectors by encoder of each placeholder that is loaded."""
        return textual_inversion.placeholders_of(self.tokenizers)
