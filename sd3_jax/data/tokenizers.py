"""Captions to token ids, without files where the tokenizer needs none."""

import functools

import numpy as np
from transformers import ByT5Tokenizer


@functools.cache
def _byt5() -> ByT5Tokenizer:
    return ByT5Tokenizer()


@functools.lru_cache(maxsize=2**16)
def byte_ids(caption: str, length: int) -> np.ndarray:
    """ByT5's ids of a caption, ended, cut or padded to `length`; "" is all padding."""
    if not caption:
        return np.zeros(length, np.int32)
    ids = _byt5()(caption, max_length=length, truncation=True, padding="max_length")
    return np.array(ids["input_ids"], np.int32)
