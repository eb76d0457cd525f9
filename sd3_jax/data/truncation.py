"""Cut texts to the tokens that an encoder reads, and tell what is lost."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from sd3_jax.foreign_text import shown

log = logging.getLogger(__name__)
# Padding and truncation are a tokenizer's state, and grain calls from many threads.
LOCK = threading.Lock()


class Cut(NamedTuple):
    """What an encoder does not read of a text: its last tokens, as text."""

    tokens: int
    text: str


def cut_ids(
    tokenizer: Any, texts: Sequence[str], length: int
) -> tuple[Int[np.ndarray, "b l"], list[Cut | None]]:
    """(ids of `length`, the Cut of each text or None), by the tokenizer's own rule."""
    options = dict(padding="max_length", max_length=length, truncation=True)
    with LOCK:
        ids = np.array(tokenizer(list(texts), **options)["input_ids"], np.int32)
        # Without truncation, only to tell what is lost. verbose=False: transformers
        # would warn of indexing errors, which truncation rules out.
        distinct = list(dict.fromkeys(texts))
        untruncated = tokenizer(distinct, verbose=False)["input_ids"]
        cuts = {
            text: unread(tokenizer, row[length - 1 : -1])
            for text, row in zip(distinct, untruncated)
        }
    return ids, [cuts[text] for text in texts]


def unread(tokenizer: Any, ids: Sequence[int]) -> Cut | None:
    return Cut(len(ids), tokenizer.decode(ids)) if len(ids) else None


def log_cuts(encoder: str, length: int, cuts: Mapping[str, Cut | None]) -> None:
    """One line on the texts of which an encoder does not read all, if there are any;
    it quotes the end of the first."""
    overlong = [cut for cut in cuts.values() if cut is not None]
    if not overlong:
        return
    most = length + max(cut.tokens for cut in overlong)
    counts = length, len(overlong), len(cuts), most
    message = "%s reads %d tokens: cuts %d of %d prompts, of %d at most;"
    log.warning(
        message + " not read: %s", encoder, *counts, shown(overlong[0].text, 200)
    )
