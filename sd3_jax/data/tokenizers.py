"""Tokenizers: bytes, which need no file, and those of the released models."""

import functools
import gzip
import logging
import os
import threading
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from sd3_jax import files
from sd3_jax.data import prompt_text
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

# Before its first import: transformers would warn that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

log = logging.getLogger(__name__)
# Padding and truncation are a tokenizer's state, and grain calls from many threads.
_LOCK = threading.Lock()
FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
MAIN_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "tokenizer_config.json")
FILES = (*MAIN_FILES, "special_tokens_map.json", "added_tokens.json", "merges.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
TOKENS = ("pad_token", "eos_token", "bos_token", "unk_token")
LARGEST = 64 * 2**20  # bytes of a file; T5's take 2.4 MB
CLIP_WORDS = 49408
VOCABULARY = epath.Path(__file__).parent / "vocabulary"
# T5 1.1 has T5's vocabulary, byte for byte. This repository is open to all and has it
# as tokenizer.json, which needs no sentencepiece; T5-XXL's own has spiece.model alone,
# and SD3's are gated.
T5_HUB = "google-t5/t5-small"
T5_WORDS = 32128  # rows of the published encoder's embedding, 100 of them of no word
# Patterns of a tokenizer's files in a hub repository.
WANTED = ("tokenizer*/*", *FILES)


@functools.cache
def _byt5() -> Any:
    # Seconds to import, so only for runs that use it; and one thread at a time,
    # because transformers' lazy modules fail where two import from them at once.
    with _LOCK:
        from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@functools.lru_cache(maxsize=2**16)
def byte_ids(caption: str, length: int) -> np.ndarray:
    """ByT5's ids of a caption, ended, cut or padded to `length`; "" is all padding."""
    if not caption:
        return np.zeros(length, np.int32)
    ids = _byt5()(caption, max_length=length, truncation=True, padding="max_length")
    return np.array(ids["input_ids"], np.int32)


def bytes_of(captions: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """A batch's "ids_bytes" (b, length) of captions, normalized as prompts are."""
    texts_ = map(prompt_text.on_one_line, captions)
    return {"ids_bytes": np.stack([byte_ids(text, length) for text in texts_])}


def load(folder: epath.PathLike) -> dict[str, Any]:
    """Load the tokenizers of a diffusers folder, by encoder; {} if it has none.

    A folder that is itself a T5 tokenizer, as in a repository of T5, is loaded as such.
    """
    folder = epath.Path(folder)
    loaded = {
        name: read(name, folder / subfolder)
        for name, subfolder in FOLDERS.items()
        if (folder / subfolder).is_dir() and any((folder / subfolder).iterdir())
    }
    return loaded or ({"t5": read("t5", folder)} if _is_t5(folder) else {})


def _is_t5(folder: epath.Path) -> bool:
    settings, kind = folder / "tokenizer_config.json", None
    if settings.exists():
        kind = files.parse_object(settings, _text(settings)).get("tokenizer_class")
    if kind is None:
        # Of the tokenizers that are read only T5's has a sentencepiece model.
        return (folder / "spiece.model").exists()
    return str(kind).startswith("T5")


def read(name: str, folder: epath.PathLike) -> Any:
    """Load and try an encoder's tokenizer, of transformers; UserError if a file is
    wrong."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    folder = epath.Path(folder)
    kind = T5TokenizerFast if name == "t5" else CLIPTokenizer
    _check_files(folder)
    if name != "t5":
        _check_merges(folder)
    try:
        tokenizer = kind.from_pretrained(os.fspath(folder), local_files_only=True)
        ids = _try(tokenizer)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # panics of the Rust library are no Exceptions
        # The error need not name a file: the first main one that exists is named.
        present = (file for file in MAIN_FILES if (folder / file).exists())
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"{folder / next(present, '')}: not a {kind.__name__}: {shown(reason, 200)}"
        ) from error
    # Such ids would read outside the encoder's embedding, which JAX does not report.
    if not all(0 <= i < len(tokenizer) for i in ids):
        raise UserError(f"{folder}: the tokenizer has ids beyond its vocabulary")
    return tokenizer


def _try(tokenizer: Any) -> list[int]:
    """Use a tokenizer as it will be used: a missing padding token fails here."""
    options = dict(padding="max_length", max_length=8, truncation=True)
    ids = tokenizer(["", "a red fox, twice!"], **options)["input_ids"]
    tokenizer.decode(ids[1])
    if [len(row) for row in ids] != [8, 8]:
        raise ValueError("it cannot pad or cut to a length")
    return [i for row in ids for i in row]


def _check_files(folder: epath.Path) -> None:
    """Check the files, and settings that the library would accept unchecked, such as
    null for the token that pads a text."""
    present = [folder / name for name in FILES if (folder / name).exists()]
    for path in present:
        files.require_regular(path)
        if (size := files.size(path)) > LARGEST:
            raise UserError(f"{path}: {size} bytes, too large to be read")
        if path.suffix == ".json":
            _check_settings(path, files.parse_object(path, _text(path)))
        elif path.suffix == ".txt":
            _text(path)
    names = {path.name for path in present}
    if names & set(MAIN_FILES) <= {"spiece.model", "tokenizer_config.json"}:
        if "spiece.model" not in names:
            raise UserError(
                f"{folder}: no tokenizer: expected {', '.join(MAIN_FILES[:3])}"
            )
        if not find_spec("sentencepiece"):
            raise UserError(
                f"{folder / 'spiece.model'}: run `pip install sentencepiece protobuf`,"
                " or provide tokenizer.json, which holds the same"
            )


def _check_merges(folder: epath.Path) -> None:
    """Check the merges of byte pair encoding: a truncated list gives other ids."""
    path, vocab = folder / "tokenizer.json", folder / "vocab.json"
    if path.exists():
        model = files.parse_object(path, _text(path))["model"]
        pieces, merges = model["vocab"], model.get("merges")
        if not isinstance(pieces, dict) or not isinstance(merges, list):
            return  # of another kind
    elif vocab.exists():
        path, pieces = folder / "merges.txt", files.parse_object(vocab, _text(vocab))
        lines = _text(path).splitlines()
        merges = [line for line in lines if not line.startswith("#version")]
    else:
        return
    pairs = [x.split(" ") if isinstance(x, str) else x for x in merges]
    texts = lambda x: isinstance(x, list) and all(isinstance(y, str) for y in x)
    if not all(map(texts, pairs)):
        raise UserError(f"{path}: expected merges of two pieces")
    results = set(map("".join, pairs))
    is_base_piece = lambda x: len(x.removesuffix("</w>")) < 2 or x.startswith("<|")
    # Every piece is a byte, a special token, or the result of a merge.
    composite = [piece for piece in pieces if not is_base_piece(piece)]
    unmerged = [piece for piece in composite if piece not in results]
    if unmerged:
        raise UserError(
            f"{path}: no merges for {len(unmerged)} pieces of the vocabulary,"
            f" {shown(unmerged[0])} first; expected the whole list"
        )


def _check_settings(path: epath.Path, settings: dict) -> None:
    for name in TOKENS if path.name in SETTINGS else ():
        token = settings.get(name, "")
        token = token.get("content") if isinstance(token, dict) else token
        needed = name in ("pad_token", "eos_token")
        if not isinstance(token, str) and (needed or token is not None):
            raise UserError(f"{path}: {name} = {shown(token)}: expected a token")
    longest = settings.get("model_max_length")
    if path.name in SETTINGS and type(longest) not in (int, float, type(None)):
        raise UserError(
            f"{path}: model_max_length = {shown(longest)}: expected a number"
        )
    if path.name == "tokenizer.json":
        model = settings.get("model")
        if not isinstance(model, dict) or not model.get("vocab"):
            raise UserError(f"{path}: expected a model with a vocab")
    if path.name == "vocab.json":
        ids = settings.values()
        if not ids or not all(type(x) is int and x >= 0 for x in ids):
            raise UserError(f"{path}: expected ids by token")


def _text(path: epath.Path) -> str:
    try:
        return files.read_bytes(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


@functools.cache
def packaged_clip(name: str) -> Any:
    """CLIP's tokenizer of CLIP_WORDS tokens, from the vocabulary that OpenAI published.

    "clip_g" pads with "!", whose id is 0, as its published folder does; "clip_l" with
    the end of text.
    """
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    text = gzip.decompress((VOCABULARY / "bpe_simple_vocab_16e6.txt.gz").read_bytes())
    lines = text.decode().split("\n")[1 : CLIP_WORDS - 2 * 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    # OpenAI's order of ids: bytes, bytes that end a word, merges, start, end of text.
    # Printable bytes first, each as its character, then the others: "!" is 0.
    letters = sorted(ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))
    pieces = [*letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {piece: i for i, piece in enumerate([*pieces, start, end])}
    return CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token=AddedToken(start, normalized=True, special=True),
        eos_token=AddedToken(end, normalized=name == "clip_l", special=True),
        unk_token=AddedToken(end, normalized=name == "clip_l", special=True),
        pad_token="!" if name == "clip_g" else end,
        model_max_length=77,
    )


def save(by_encoder: dict[str, Any], folder: epath.PathLike) -> dict[str, list]:
    """Save tokenizers in a diffusers folder; returns its model_index.json entries."""
    index = {}
    for name, subfolder in FOLDERS.items():
        index[subfolder] = [None, None]
        if name in by_encoder:
            by_encoder[name].save_pretrained(os.fspath(epath.Path(folder) / subfolder))
            index[subfolder] = ["transformers", type(by_encoder[name]).__name__]
    return index


def token_ids(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    *,
    encoder: str,
    cut: Counter[str] | None = None,
) -> Int[np.ndarray, "b l"]:
    """Token ids, truncated or padded to `length` by the tokenizer's own rule.

    The number of truncated texts is logged for this `encoder`, "CLIP" or "T5", or added
    to cut[encoder] if `cut` is passed.
    """
    options = dict(padding="max_length", max_length=length, truncation=True)
    with _LOCK:
        ids = np.array(tokenizer(list(texts), **options)["input_ids"], np.int32)
        # Without truncation, only to count and show what is lost; each text once where
        # the count is for people.
        counted = list(texts if cut is not None else dict.fromkeys(texts))
        untruncated = tokenizer(counted)["input_ids"]
        overlong = [row for row in untruncated if len(row) > length]
        if cut is not None:
            cut[encoder] += len(overlong)
        elif overlong:
            unread = shown(tokenizer.decode(overlong[0][length - 1 : -1]), 200)
            counts = length, len(overlong), len(untruncated), max(map(len, overlong))
            message = "%s reads %d tokens: cuts %d of %d prompts, of %d at most;"
            message += " not read: %s"
            log.warning(message, encoder, *counts, unread)
    return ids
