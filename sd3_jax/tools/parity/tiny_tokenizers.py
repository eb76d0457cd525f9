"""Tiny real tokenizers, as the published folders have them: two CLIPs and a T5.

CLIP: bytes and bytes that end a word (512 ids), some merges, then the start and the end
of a text, which has the largest id. The second pads with "!", whose id is 0. T5: a
unigram model of letters and a few words; 0 pads, 1 ends.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import T5TokenizerFast

MERGES = ("r e", "re d</w>", "f o", "fo x</w>", "i n</w>", "t h", "th e</w>")
CLIP_VOCAB = 512 + len(MERGES) + 2
WORDS = ("▁", "▁a", "▁red", "▁fox", "▁the", "▁in", "s", "ing", "!", ",")
T5_PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
T5_PIECES += [(word, -2.0 - i / 10) for i, word in enumerate(WORDS)]
T5_PIECES += [(letter, -6.0) for letter in "abcdefghijklmnopqrtuvwxyz0123456789"]
T5_VOCAB = len(T5_PIECES)


def save(folder: Path) -> None:
    """Into folder/tokenizer, folder/tokenizer_2 and folder/tokenizer_3."""
    clip(folder / "tokenizer", pad="<|endoftext|>")
    clip(folder / "tokenizer_2", pad="!")
    t5().save_pretrained(folder / "tokenizer_3")


def clip(folder: Path, pad: str) -> None:
    folder.mkdir(parents=True)
    shown = pre_tokenizers.ByteLevel.alphabet()
    letters = sorted(shown, key=lambda c: (c != "!", c))  # "!" is 0, as published
    pieces = [*letters, *(f"{c}</w>" for c in letters)]
    pieces += [merge.replace(" ", "") for merge in MERGES]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # The end of text must have the largest id: pooling looks for it by argmax.
    assert len(vocab) == CLIP_VOCAB
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {k: v for k, v in config.items() if k.endswith("_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def t5() -> T5TokenizerFast:
    tokenizer = Tokenizer(models.Unigram(T5_PIECES, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)
