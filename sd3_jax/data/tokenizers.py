"""Captions to token ids, without files where the tokenizer needs none."""

import functools
import os

import numpy as np

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of no PyTorch
from transformers import ByT5Tokenizer  # noqa: E402


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
