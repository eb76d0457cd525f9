"""A tokenizer with placeholders of textual inversion, which stand for added ids."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

LONGEST = 64  # characters of a placeholder
COMFY = "embedding:"  # ComfyUI writes embedding:NAME in a prompt


class PlaceholderTokenizer:
    """`base` with `ids`: for each placeholder the ids of its vectors, in their order.

    It is called as `base` is, and pads and cuts as it does. Each placeholder is also
    known as embedding:NAME. Ids need not follow those of `base`: an embedding may have
    spare rows behind its vocabulary.
    """

    def __init__(self, base: Any, ids: Mapping[str, tuple[int, ...]]):
        from tokenizers import AddedToken

        self.base, self.ids = base, dict(ids)
        self.pad_token_id = base.pad_token_id
        # The ids that begin and end a text: CLIP's start and end, T5's end alone.
        *self.prefix, self.end = base("")["input_ids"]
        # A copy: a tokenizer is shared by bundles, and added words would be known in
        # all of them.
        self._words = copy.deepcopy(base)
        self._vectors: dict[int, tuple[int, ...]] = {}
        self._names: dict[int, str] = {}
        for name, vectors in self.ids.items():
            for word in (name, COMFY + name):
                # A word of letters alone must not match within another word.
                whole = re.fullmatch(r"\w.*\w|\w", word) is not None
                self._words.add_tokens([AddedToken(word, single_word=whole)])
                self._vectors[self._words.convert_tokens_to_ids(word)] = vectors
            self._names |= dict.fromkeys(vectors, name)

    def __len__(self) -> int:
        return len(self.base)

    def __call__(
        self,
        texts: Sequence[str] | str,
        *,
        padding: str | bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        verbose: bool = True,
    ) -> dict[str, list]:
        """{"input_ids": rows}, cut and padded to max_length as asked."""
        alone = isinstance(texts, str)
        batch = [texts] if alone else list(texts)
        rows = []
        for row in self._words(batch, verbose=False)["input_ids"]:
            row = [i for word in row for i in self._vectors.get(word, (word,))]
            if truncation and max_length is not None and len(row) > max_length:
                # As tokenizers cut: the last token stays the end, where CLIP's pooled
                # vector is read.
                row = [*row[: max_length - 1], self.end]
            if padding == "max_length" and max_length is not None:
                row += [self.pad_token_id] * (max_length - len(row))
            rows.append(row)
        return {"input_ids": rows[0] if alone else rows}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; a run of one placeholder's vectors is the placeholder."""
        words, run = [], []
        for i, name in [(i, self._names.get(i)) for i in ids]:
            if name is None:
                run.append(i)
                continue
            words += [self.base.decode(run)] * bool(run)
            run = []
            words += [name] * (not words or words[-1] != name)
        return " ".join([*words, *[self.base.decode(run)] * bool(run)])


def check(token: str, tokenizer: Any, encoder: str) -> None:
    """UserError unless a text may be a placeholder beside a tokenizer's words."""
    if not token or len(token) > LONGEST or not token.isprintable() or " " in token:
        raise UserError(
            f'token "{shown(token)}": expected 1 to {LONGEST} characters without'
            ' spaces, such as "<fox>"; set token'
        )
    base = getattr(tokenizer, "base", tokenizer)
    words = base.get_vocab()
    # CLIP's words end in </w>, T5's begin with ▁. As a placeholder such a word would
    # change prompts that do not mean the embedding.
    if any(word in words for word in (token, f"{token.lower()}</w>", f"▁{token}")):
        raise UserError(
            f'token "{token}" is a word of the tokenizer of {encoder}; set'
            f' token="<{token}>"'
        )
