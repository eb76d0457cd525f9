"""Textual inversion: learned vectors become rows behind the encoders' token tables."""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sd3_jax.data import placeholders
from sd3_jax.data.placeholders import PlaceholderTokenizer
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed as spelled
from sd3_jax.models.clip import LEGACY_EOS, ClipText
from sd3_jax.models.token_table import ADDED
from sd3_jax.sampling import argument_checks, compiled
from sd3_jax.sampling.text.prompt_tokens import TEXT
from sd3_jax.weights import embedding_files, sources
from sd3_jax.weights.embedding_files import Learned
from sd3_jax.weights.source_names import split_token

log = logging.getLogger(__name__)
ROWS = 32  # added rows come in multiples, so that bundles share their programs
TABLES = {"clip_l": "tokens", "clip_g": "tokens", "t5": "embedding"}
Tokens = str | Sequence[str] | None


class Encoders(NamedTuple):
    """A bundle's text encoders, and all that an embedding changes of them."""

    modules: dict[str, nn.Module]
    variables: dict[str, dict]
    tokenizers: dict[str, Any]


def listed(requested: Any) -> list[tuple[str, Tokens]]:
    """(path or hub name, placeholder or None) of one or several: paths, "path=<token>",
    or {path: token}."""
    if isinstance(requested, Mapping):
        return [(path_text(path), token) for path, token in requested.items()]
    several = isinstance(requested, list | tuple | set)
    texts = map(path_text, requested if several else [requested])
    return [split_token(text, sources.exists) for text in texts]


def path_text(source: Any) -> str:
    """An embedding's path or hub name as text; UserError for anything else."""
    expected = "a file, a folder or a hub name"
    return argument_checks.path_text("embedding", source, expected)


def opened(source: str, token: Any, widths: Mapping[str, int]) -> list[Learned]:
    """The embeddings of a file for the text encoders of these `widths`.

    `token` replaces the placeholder of the file; several tokens name its vectors one by
    one. What is not used is logged; UserError if nothing is.
    """
    several = isinstance(token, list | tuple)
    if not (token is None or isinstance(token, str)) and not (
        several and all(isinstance(x, str) for x in token)
    ):
        raise UserError(
            f"token {argument_checks.spelled(token)}: expected a text such as"
            ' "<fox>", or a list of them'
        )
    if not widths:
        raise UserError("no text encoder to load an embedding into")
    learned_embeddings = _named(embedding_files.read(source, widths), token)
    for learned in learned_embeddings:
        absent = [name for name in learned.vectors if name not in widths]
        if len(absent) == len(learned.vectors):
            raise UserError(
                f"{learned.path} has vectors for {spelled(absent)}, but the text"
                f" encoders are {spelled(widths)}"
            )
        if absent:
            message = "%s: its vectors for %s are not used, as that is not loaded"
            log.warning(message, learned.path, spelled(absent))
        if plain := [name for name in widths if name not in learned.vectors]:
            message = '%s: no vectors for %s, which reads "%s" as text'
            log.warning(message, learned.path, spelled(plain), learned.token)
    return learned_embeddings


def widths_of(configs: Mapping[str, dict], present: Collection[str]) -> dict[str, int]:
    """The widths of the text encoders that are present, by their configurations."""
    key = lambda name: "d_model" if name == "t5" else "hidden_size"
    return {name: configs[name][key(name)] for name in TEXT if name in present}


def with_embedding(encoders: Encoders, learned: Learned, mesh: Mesh) -> Encoders:
    """The encoders with the vectors behind their tables.

    The published tables are shared; only the added rows are new arrays.
    """
    names = [name for name in TEXT if name in learned.vectors.keys() & encoders.modules]
    for name in names:
        encoders = _extended(encoders, name, learned, mesh)
    counts = ", ".join(f"{len(learned.vectors[name])} of {name}" for name in names)
    log.info('%s: "%s" has vectors: %s', learned.path, learned.token, counts)
    return encoders


def _named(embeddings: list[Learned], token: Tokens) -> list[Learned]:
    """The embeddings under the names that the caller gives them."""
    if token is None:
        return embeddings
    if len(embeddings) > 1:
        names = spelled(x.token for x in embeddings)
        raise UserError(f"{embeddings[0].path} has several tokens, {names}; omit token")
    learned = embeddings[0]
    if isinstance(token, str):
        return [learned._replace(token=token)]
    counts = {name: len(x) for name, x in learned.vectors.items()}
    if set(counts.values()) != {len(token)}:
        raise UserError(
            f"{learned.path}: {len(token)} tokens for"
            f" {spelled(f'{n} vectors of {name}' for name, n in counts.items())}; give"
            " one token, or one for each vector"
        )
    return [
        learned._replace(
            token=one, vectors={k: x[i : i + 1] for k, x in learned.vectors.items()}
        )
        for i, one in enumerate(token)
    ]


def _extended(encoders: Encoders, name: str, learned: Learned, mesh: Mesh) -> Encoders:
    module, tokenizer = encoders.modules[name], encoders.tokenizers.get(name)
    if tokenizer is None:
        raise UserError(
            f"{learned.path}: the bundle has no tokenizer for {name} to add"
            f' "{learned.token}" to; set tokenizers_from=FOLDER'
        )
    placeholders.check(learned.token, tokenizer, name)
    ids = tokenizer.ids if isinstance(tokenizer, PlaceholderTokenizer) else {}
    if learned.token in ids:
        raise UserError(
            f'{learned.path}: "{learned.token}" is loaded already for {name}; set'
            " another token"
        )
    # --- rows of the table
    params = encoders.variables[name]["params"]
    table, used = params[TABLES[name]], sum(map(len, ids.values()))
    # Behind the model's table and not the tokenizer's words: T5's table has rows
    # (32128) that no word has.
    first, count = module.vocab + used, len(learned.vectors[name])
    # Spare rows are zeros, and no text has their ids.
    rows = -(-(used + count) // ROWS) * ROWS
    values = np.zeros((rows, module.width), table.dtype)
    if used:
        # Added rows may be sharded over processes; each builds the whole table from its
        # copy.
        values[:used] = process_allgather(params[ADDED], tiled=True)[:used]
    values[used : used + count] = learned.vectors[name]
    # --- placed as the table is, along its width
    spec = (*table.sharding.spec, None, None)
    kind = table.sharding.memory_kind
    where = NamedSharding(mesh, PartitionSpec(None, spec[1]), memory_kind=kind)
    params = params | {ADDED: compiled.put(values, where)}
    ids = ids | {learned.token: tuple(range(first, first + count))}
    # Around the tokenizer itself: wrappers do not nest.
    base = getattr(tokenizer, "base", tokenizer)
    options: dict[str, Any] = {"added": rows}
    if isinstance(module, ClipText) and module.eos == LEGACY_EOS:
        # The largest id of a text would be a placeholder's, and no longer its end.
        options["eos"] = base.eos_token_id
    return Encoders(
        encoders.modules | {name: dataclasses.replace(module, **options)},
        encoders.variables | {name: encoders.variables[name] | {"params": params}},
        encoders.tokenizers | {name: PlaceholderTokenizer(base, ids)},
    )


def placeholders_of(by_encoder: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The number of vectors of each placeholder, by encoder."""
    counts: dict[str, dict[str, int]] = {}
    for name, tokenizer in by_encoder.items():
        if isinstance(tokenizer, PlaceholderTokenizer):
            for token, ids in tokenizer.ids.items():
                counts.setdefault(token, {})[name] = len(ids)
    return counts
