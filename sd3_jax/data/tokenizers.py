"""Captions to token ids: bytes, which need no file, and the released models' own."""

import functools
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from sd3_jax.errors import UserError
from sd3_jax.outside import shown

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of no PyTorch
from transformers import ByT5Tokenizer  # noqa: E402

log = logging.getLogger(__name__)
_LOCK = threading.Lock()  # padding and truncation are a tokenizer's state
FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}


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


def bytes_of(captions: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """A batch's "ids_bytes" (b, length)."""
    return {"ids_bytes": np.stack([byte_ids(one, length) for one in captions])}


def load(folder: epath.PathLike) -> dict[str, Any]:
    """The tokenizers that a diffusers folder holds, by encoder; none is no error."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    kinds = {"clip_l": CLIPTokenizer, "clip_g": CLIPTokenizer, "t5": T5TokenizerFast}
    found = {}
    for name, kind in kinds.items():
        path = epath.Path(folder) / FOLDERS[name]
        if path.is_dir() and any(path.iterdir()):
            try:
                found[name] = kind.from_pretrained(os.fspath(path))
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"{path}: not a tokenizer: {reason}") from error
    return found


def save(found: dict[str, Any], folder: epath.PathLike) -> dict[str, list]:
    """Into a diffusers folder; what its model_index.json is to say of them."""
    index = {}
    for name, place in FOLDERS.items():
        index[place] = [None, None]
        if name in found:
            found[name].save_pretrained(os.fspath(epath.Path(folder) / place))
            index[place] = ["transformers", type(found[name]).__name__]
    return index


def clip_ids(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    cut: Counter[str] | None = None,
) -> Int[np.ndarray, "b l"]:
    """As CLIP's encoders read them, cut or padded by the tokenizer's own rule.

    How many are cut is logged, or added to `cut` where it is given.
    """
    return _ids(tokenizer, texts, length, "CLIP", cut)


def t5_ids(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    cut: Counter[str] | None = None,
) -> Int[np.ndarray, "b l"]:
    return _ids(tokenizer, texts, length, "T5", cut)


def _ids(tokenizer, texts, length, what, counts):
    with _LOCK:
        return _locked_ids(tokenizer, texts, length, what, counts)


def _locked_ids(tokenizer, texts, length, what, counts):
    options = dict(padding="max_length", max_length=length, truncation=True)
    ids = np.array(tokenizer(list(texts), **options)["input_ids"], np.int32)
    if counts is not None:
        whole = tokenizer(list(texts))["input_ids"]
        counts[what] += sum(len(row) > length for row in whole)
        return ids
    whole = tokenizer(list(dict.fromkeys(texts)))["input_ids"]
    if cut := [row for row in whole if len(row) > length]:
        lost = shown(tokenizer.decode(cut[0][length - 1 : -1]), 200)
        counts = length, len(cut), len(whole), max(map(len, cut))
        told = "%s reads %d tokens: cuts %d of %d prompts, of %d at most; not read: %s"
        log.warning(told, what, *counts, lost)
    return ids
