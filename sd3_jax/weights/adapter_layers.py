"""The layers of a model that an adapter's file names, in any tool's spelling."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn

from sd3_jax.errors import UserError, near
from sd3_jax.foreign_text import listed
from sd3_jax.models.token_table import ADDED
from sd3_jax.weights import adapter_kinds, key_mapping
from sd3_jax.weights.adapter_kinds import Update
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.key_mapping import Piece

# Models by the width of their transformer.
WIDTHS = {1536: "SD3 Medium and SD3.5 Medium", 2432: "SD3.5 Large", 3072: "Flux"}
# Layers of the denoiser whose inputs are as wide as the transformer.
ATTENTION_INPUT = re.compile(
    r"attn_(to_[qkv]|add_[qkv]_proj|qkv)$"  # flat, in both layouts
)


class Layers(NamedTuple):
    """The layers of a component that a file changes, by their names in the file."""

    path: epath.Path
    updates: dict[str, Update]

    @property
    def ranks(self) -> set[int | None]:
        return {update.rank for update in self.updates.values()}


class Target(NamedTuple):
    """A parameter of a layer that an update changes, as a piece of one of our leaves.

    `module` is the layer's name in `layout`, `part` is "weight" or "bias".
    """

    update: Update
    layout: str
    module: str
    part: str
    piece: Piece


class Place(NamedTuple):
    """A layer of the model: its layout, its name in it, its "weight" and "bias"."""

    layout: str
    module: str
    pieces: dict[str, Piece]


def targets(layers: Layers, name: str, module: nn.Module, params: Any) -> list[Target]:
    """Where each update goes in a model whose `params` may be shapes.

    Raises UserError for layers that do not fit, with their number and the first ten.
    """
    places = _places(name, module, params, "diffusers")
    # Only where needed: most files have names of one layout.
    if any(_flat(key) not in places for key in layers.updates):
        fused = _places(name, module, params, "original")
        places = {**fused, **_parts_of_fused(places, fused), **places}
    matches, faults, seen, unknown = [], {}, {}, []
    for key, update in layers.updates.items():
        if (place := places.get(_flat(key))) is None:
            faults[key] = f"{key} is not a layer of the model"
            unknown.append(key)
            continue
        layout, layer, pieces = place
        # A LoRA with a bias, or diff with diff_b, changes two parameters.
        for part in sorted(adapter_kinds.changes(update)):
            if (piece := pieces.get(part)) is None:
                faults[key] = f"{key} has no {part} in the model"
            elif fault := adapter_kinds.misfit(update, part, piece.file_shape):
                faults[key] = f"{key}.{fault}"
            else:
                matches.append(Target(update, layout, layer, part, piece))
        # kohya's and diffusers' name of one map in a single file would collide here.
        if (other := seen.setdefault((layout, layer), key)) != key:
            faults[key] = f"{key} is the same layer as {other}"
    if faults:
        hint = _size_hint(layers, module)
        if not hint and len(faults) == 1 and unknown:
            guess = near(*unknown, [place.module for place in places.values()])
            hint = f'; did you mean "{guess}"?' if guess else ""
        raise UserError(
            f"{layers.path}: {len(faults)} of {len(layers.updates)} layers do not fit"
            f" {name}: {listed(faults.values(), '; ')}{hint}"
        )
    return matches


def _places(name: str, module: nn.Module, params: Any, layout: str) -> dict[str, Place]:
    """The layers of a model by their names in a layout, with underscores for dots."""
    table = COMPONENTS[name].table(module)
    # No layout has the rows of textual inversion, and no adapter changes them.
    params = {key: x for key, x in params.items() if key != ADDED}
    try:
        pieces = key_mapping.pieces({"params": params}, table, layout)
    except KeyError as error:
        raise UserError(
            f"adapter of {error.args[0]}: the published layouts have no such module"
        ) from None
    places: dict[str, Place] = {}
    for piece in pieces:
        if piece.key is None:  # the layout lacks it, such as CLIP-L's projection
            continue
        layer, _, part = piece.key.rpartition(".")
        place = places.setdefault(_flat(layer), Place(layout, layer, {}))
        place.pieces[part] = piece
    # transformers 5 leaves out CLIP's "text_model.".
    short = {key.removeprefix("text_model_"): place for key, place in places.items()}
    return short | places


def _parts_of_fused(
    split: Mapping[str, Place], fused: Mapping[str, Place]
) -> dict[str, Place]:
    """OneTrainer's names of q, k and v: the original layout's qkv.0 to qkv.2."""
    names = {}
    for key, place in fused.items():
        piece = place.pieces.get("weight")
        # Python 3.11 cannot hash slices: those of q, k and v that are not fused, as in
        # the text encoders, whose layouts have the same names.
        if piece is not None and slice(None) not in piece.index:
            names[piece.path, piece.index] = key
    parts = {}
    for place in split.values():
        piece = place.pieces.get("weight")
        if piece is not None and piece.index and piece.path[-1] == "kernel":
            # The last index counts the fused maps, after the inputs.
            whole = (piece.path, piece.index[:-2])
            if slice(None) in piece.index and whole in names:
                parts[f"{names[whole]}_{piece.index[-1]}"] = place
    return parts


def _flat(name: str) -> str:
    """A name with underscores for dots, as kohya's, in which all tools agree."""
    return name.replace(".", "_")


def _size_hint(layers: Layers, module: nn.Module) -> str:
    """A remark if a file has wider or more layers than the model."""
    widths = {
        x.shape[-1]
        for key, update in layers.updates.items()
        for role, x in update.tensors.items()
        if role == "A" and len(x.shape) == 2 and ATTENTION_INPUT.search(_flat(key))
    }
    width = getattr(module, "width", 0)
    if len(widths) == 1 and width and width not in widths:
        (other,) = widths
        owner = f", as those of {WIDTHS[other]}" if other in WIDTHS else ""
        return f"; its layers are {other} wide{owner}, and the model's {width}"
    # Five parts reach the block's number in the longest form,
    # text_model_encoder_layers_11, and no layer's within a block, such as net.2.
    numbers = [
        int(part)
        for key in layers.updates
        for part in _flat(key).split("_")[:5]
        if part.isdecimal() and len(part) < 5
    ]
    depth = getattr(module, "depth", 0)
    if not numbers or max(numbers) < depth or not depth:
        return ""
    return f"; the file has {max(numbers) + 1} blocks and the model {depth}"
