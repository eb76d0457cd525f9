"""The tokenizers of a released model: from its folders, the package or the hub."""

from collections.abc import Sequence
from typing import Any

from sd3_jax.data import tokenizers
from sd3_jax.errors import UserError
from sd3_jax.sampling.bundle import CLIPS
from sd3_jax.weights import sources


def tokenizers_of(paths: Sequence, other: str, configs: dict) -> dict[str, Any]:
    """Tokenizers of a model's folders or of `other`; for CLIP the package has one.

    Each must match the vocabulary size of its encoder."""
    # A place that the caller names replaces the model's own folders.
    if other:
        paths = [sources.resolve(other, tokenizers.WANTED, label="tokenizers")]
    words = {}
    for path in paths:
        folder_tokenizers = tokenizers.load(path)
        if other and not folder_tokenizers:
            raise UserError(
                f"{path}: no tokenizers; expected a diffusers folder, which has them in"
                f" {', '.join(tokenizers.FOLDERS.values())}, or that of T5"
            )
        # The first folder that has a tokenizer wins.
        for name in [name for name in folder_tokenizers if name not in words]:
            check_vocabulary(
                name, len(folder_tokenizers[name]), configs.get(name, {}), path
            )
            words[name] = folder_tokenizers[name]
    # Both CLIPs of the released models share OpenAI's vocabulary, which the package
    # has; T5's is larger and is downloaded.
    for name in CLIPS:
        size = configs.get(name, {}).get("vocab_size")
        if name not in words and size == tokenizers.CLIP_WORDS:
            words[name] = tokenizers.packaged_clip(name)
    return words


def fetched_tokenizer(name: str, config: dict, source: str) -> Any:
    """T5's tokenizer from the hub; the UserError says how to give one instead."""
    remedy = (
        "set tokenizers_from=FOLDER (config.tokenizers), a diffusers folder or a hub"
        " name; or None to pass only embeddings"
    )
    rows = config["vocab_size"]
    # Another vocabulary means another tokenizer, which only the caller can know.
    if name != "t5" or rows != tokenizers.T5_WORDS:
        raise UserError(
            f"{source}: no tokenizer for {name}, whose {rows} rows differ from the"
            f" published encoder: {remedy}"
        )
    try:
        folder = sources.resolve(
            tokenizers.T5_HUB, tokenizers.WANTED, label="tokenizers"
        )
        tokenizer = tokenizers.read("t5", folder)
    except UserError as error:
        raise UserError(f"{source}: no tokenizer for t5 ({error}): {remedy}") from None
    check_vocabulary(name, len(tokenizer), config, folder)
    return tokenizer


def check_vocabulary(name: str, tokens: int, config: dict, where: Any) -> None:
    """UserError if a tokenizer does not fit its encoder's vocabulary: ids of another
    model are other words, and ids beyond the embedding's rows give NaN."""
    rows = config.get("vocab_size")
    spare = 128 if name == "t5" else 0  # rows that its embedding has without a word
    if isinstance(rows, int) and not rows - spare <= tokens <= rows:
        raise UserError(
            f"{where}: its tokenizer for {name} has {tokens} tokens but the encoder has"
            f" {rows} rows; set the tokenizer of the same model (config.tokenizers)"
        )
