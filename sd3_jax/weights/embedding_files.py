"""Read files of textual inversion: learned vectors by placeholder and text encoder.

Names of the tensors are those of diffusers (learned_embeds.safetensors: the
placeholder), of ComfyUI, AUTOMATIC1111, kohya and OneTrainer ("clip_l", "clip_g",
"t5xxl" or "t5", and "emb_params" for one encoder), and of diffusers' pivotal tuning
("text_encoders_0"). Then the placeholder is the file's name.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed, shown
from sd3_jax.weights import sources, unsupported_formats
from sd3_jax.weights.safetensors import Tensor, open_file

WANTED = ("learned_embeds*.safetensors",)
NAMES = {  # of tensors, by encoder
    "clip_l": ("clip_l", "text_encoders_0"),
    "clip_g": ("clip_g", "text_encoders_1"),
    "t5": ("t5xxl", "t5"),
}
ENCODERS = {name: encoder for encoder, names in NAMES.items() for name in names}
UNNAMED = ("emb_params", "*")  # kohya's and AUTOMATIC1111's for a single encoder
OUTPUT = "_out"  # OneTrainer's vectors that replace an encoder's output
# diffusers' scripts for two encoders write learned_embeds.safetensors and, for the
# second, learned_embeds_2.safetensors.
NUMBERED = {"2": "clip_g", "3": "t5"}
# As many tokens as T5 reads at most: more rows are a table or a matrix.
MOST_VECTORS = 512


class Learned(NamedTuple):
    """The vectors (n, d) of one placeholder by encoder, and where they are from."""

    token: str
    vectors: dict[str, np.ndarray]
    path: epath.Path


def read(source: str, widths: Mapping[str, int]) -> list[Learned]:
    """The embeddings at a path or hub name, for encoders of these widths.

    A folder holds learned_embeds.safetensors and its numbered companions, or one other
    file. Raises UserError for pickles, other tensors and vectors of another width.
    """
    path = sources.resolve(source, WANTED, label="embedding")
    if path.is_dir():
        by_token: dict[str, Learned] = {}
        for file in _files(path):
            for learned in _read_file(file, widths):
                first = by_token.setdefault(learned.token, learned)
                twice = first.vectors.keys() & learned.vectors.keys()
                if twice and first is not learned:
                    raise UserError(
                        f"{file}: has vectors of {shown(learned.token)} for"
                        f" {listed(sorted(twice))}, as {first.path.name} has; name one"
                        " of the two"
                    )
                # The companions repeat the placeholder, each for another encoder.
                first.vectors.update(learned.vectors)
        return list(by_token.values())
    return _read_file(path, widths)


def _files(folder: epath.Path) -> list[epath.Path]:
    files = sorted(x for x in folder.iterdir() if x.name.endswith(".safetensors"))
    named = [x for x in files if x.name.startswith("learned_embeds")]
    if not files:
        unsupported_formats.refuse_pickles(folder)
        raise UserError(
            f"{folder}: no embedding; expected learned_embeds.safetensors (a"
            " learned_embeds.bin is a pickle and must be converted)"
        )
    if not named and len(files) > 1:
        names = listed(x.name for x in files)
        raise UserError(f"{folder}: several files, {names}; name one of them")
    return named or files


def _read_file(path: epath.Path, widths: Mapping[str, int]) -> list[Learned]:
    tensors, _ = open_file(path)
    # OneTrainer writes them beside the others, or alone; to leave them out would be
    # another embedding.
    outputs = [name + OUTPUT for name in ENCODERS if name + OUTPUT in tensors]
    if outputs:
        raise UserError(
            f"{path}: {listed(outputs)}: embeddings of an encoder's output are not"
            " supported; expected vectors of its input"
        )
    known = {name: ENCODERS[name] for name in tensors if name in ENCODERS}
    if known:
        if unknown := [name for name in tensors if name not in known]:
            raise UserError(
                f"{path}: {len(unknown)} tensors beside {listed(known)} are not known:"
                f" {listed(unknown)}"
            )
        for encoder in set(known.values()):
            names = [name for name, owner in known.items() if owner == encoder]
            if len(names) > 1:
                raise UserError(
                    f"{path}: {listed(names)} are all for {encoder}; expected one of"
                    " them"
                )
        vectors = {
            encoder: _vectors(path, name, tensors[name], widths.get(encoder))
            for name, encoder in known.items()
        }
        return [Learned(path.stem, vectors, path)]
    return [
        Learned(
            path.stem if name in UNNAMED else name,
            {encoder: _vectors(path, name, tensor, widths[encoder])},
            path,
        )
        for name, tensor in _single(path, tensors).items()
        for encoder in [_encoder_of(path, name, tensor, widths)]
    ]


def _single(path: epath.Path, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors of a file whose names are placeholders; UserError for a model."""
    # Guesses at a checkpoint or a LoRA: embeddings are a few matrices without such
    # names.
    many = len(tensors) > 16 or any(len(x.shape) > 2 for x in tensors.values())
    if not tensors or many or any(re.search(r"\.(weight|bias)$", x) for x in tensors):
        raise UserError(
            f"{path}: no textual inversion: expected tensors clip_l, clip_g and t5xxl,"
            f" or one named by its placeholder; it has {listed(tensors)}"
        )
    return tensors


def _encoder_of(
    path: epath.Path, name: str, tensor: Tensor, widths: Mapping[str, int]
) -> str:
    """The encoder of vectors whose name does not tell it: by width, then by file."""
    width = tensor.shape[-1] if tensor.shape else 0
    # CLIP-L is 768 wide, CLIP-G 1280 and T5 4096, so that the width decides in all
    # published models; in toy models it may fit several.
    fitting = [encoder for encoder, size in widths.items() if size == width]
    if not fitting:
        raise UserError(
            f"{path}: {shown(name)} has vectors of width {width}; expected"
            f" {_spelled(widths)}"
        )
    number = re.search(r"_(\d)$", path.stem)
    numbered = NUMBERED.get(number[1]) if number else None
    return numbered if numbered in fitting else fitting[0]


def _vectors(
    path: epath.Path, name: str, tensor: Tensor, width: int | None
) -> np.ndarray:
    """(n, d) in float32; with `width` None, of an encoder that is not loaded, any d."""
    # Early files of diffusers have a single vector (d,).
    shape = tensor.shape if len(tensor.shape) > 1 else (1, *tensor.shape)
    if len(shape) != 2 or not all(shape) or shape[0] > MOST_VECTORS:
        raise UserError(
            f"{path}: {shown(name)} of shape {tensor.shape}: expected (vectors, width)"
        )
    if tensor.dtype.kind in "biu":
        raise UserError(f"{path}: {shown(name)} is of {tensor.dtype}; expected floats")
    if width is not None and shape[1] != width:
        raise UserError(
            f"{path}: {shown(name)} has vectors of width {shape[1]}; expected {width},"
            " that of this model's encoder"
        )
    vectors = tensor.read().astype(np.float32).reshape(shape)
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: {shown(name)} has values that are NaN or infinite")
    return vectors


def _spelled(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{size} ({encoder})" for encoder, size in widths.items())
