"""Load LoRA trees from files and save them, by the models' key tables.

A file has a pair of matrices for each layer. In diffusers' layout q, k and v have pairs
of their own; kohya's names are of the original layout, which fuses them.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn

from sd3_jax.data.float_bits import finite
from sd3_jax.errors import UserError, near
from sd3_jax.params.lora import kernels, layout, layout_of, modules, nested
from sd3_jax.weights import key_mapping, safetensors, sharded_load
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.key_mapping import Kind, Piece, Row
from sd3_jax.weights.lora_formats import FILE, METADATA, PREFIXES, Pair, Pairs
from sd3_jax.weights.safetensors import Entry


def load(
    pairs: Pairs, name: str, module: nn.Module, params: Any, *, weight: float = 1.0
) -> dict:
    """The pairs of a component as a LoRA (params/lora.py) in host memory, float32.

    b includes alpha and `weight`: attach the LoRA without alpha. Layers of a stack, and
    q, k or v, that the file lacks are zero; smaller ranks are padded with zeros.
    `params` may be shapes. Raises UserError for a module that the component lacks.
    """
    # --- which linear map each name means, in diffusers' layout or the original
    shapes = {path: tuple(x.shape) for path, x in kernels(params).items()}
    ones = _pseudo(shapes, dict.fromkeys(shapes, 1))  # of rank 1, for the names alone
    places = _places(name, module, ones, "diffusers")
    layouts = ["diffusers"]
    # Only where needed: ComfyUI's and kohya's files alone have original names.
    if any(_diffusers(key, places) is None for key in pairs):
        places |= _places(name, module, ones, "original")
        layouts.append("original")
    # kohya's and diffusers' name of one map in a single file would collide here.
    known = {_known(key, places, pair): pair for key, pair in pairs.items()}
    if len(known) < len(pairs):
        raise UserError(f"LoRA of {name}: names a linear layer twice")
    # --- one rank for each kernel, the largest of its layers' and of q, k and v
    ranks: dict[tuple, int] = {}
    for place, pair in known.items():
        path = places[place]
        ranks[path] = max(ranks.get(path, 0), pair.rank)
    # --- read each tensor into its part of the stack
    matrices = _pseudo({path: shapes[path] for path in ranks}, ranks)
    for kind in layouts:
        for side, pieces in enumerate(_pieces(name, module, matrices, kind)):
            for piece in pieces:
                if (pair := known.get((kind, _module(piece)))) is not None:
                    part = _matrix(pair, side, piece, ranks[piece.path[1:-1]])
                    share = pair.scale * weight if side else 1.0  # in b alone
                    scaled = share * piece.read(part)
                    # Finite factors may overflow: kohya's alpha has no bound.
                    if not np.isfinite(scaled).all():
                        raise UserError(
                            f"{pair.up.path}: {_module(piece)}: overflows float32 when"
                            f" multiplied by {share:g} (alpha / rank times the weight);"
                            " use a smaller weight"
                        )
                    matrices[side][piece.path[1:-1]][piece.index] = scaled
    a, turned_b = matrices
    b = {path: _turn(path, shapes[path], x) for path, x in turned_b.items()}
    return nested({path: {"a": a[path], "b": b[path]} for path in ranks})


def save(
    path: epath.PathLike,
    loras: Mapping[str, dict],
    parts: Mapping[str, nn.Module],
    *,
    alpha: float = 0.0,
    dtype: Any = np.float32,
    facts: Mapping[str, str] | None = None,
) -> epath.Path:
    """Write a .safetensors file, or FILE in a folder, that diffusers loads.

    `loras` and their modules `parts` are by component; `alpha` is that of attach.
    `facts` are added to the file's metadata. All processes must call.
    """
    path = epath.Path(path)
    path = path if path.name.endswith(".safetensors") else path / FILE
    entries: dict[str, Entry] = {}
    peft: dict[str, Any] = {}
    for name, lora in loras.items():
        tensors = _tensors(name, parts[name], lora, alpha, np.dtype(dtype))
        prefix = next(k for k, v in PREFIXES.items() if v == name)  # "transformer"
        peft |= {f"{prefix}.{k}": v for k, v in _peft(tensors).items()}
        for key, x in tensors.items():
            entries[f"{prefix}.{key}"] = Entry(x.dtype, x.shape, lambda x=x: x)
    metadata = dict(facts or {}) | {
        METADATA: json.dumps(peft, indent=2, sort_keys=True)
    }
    # All processes gathered the arrays; one writes.
    if jax.process_index() == 0:
        safetensors.write_file(path, entries, metadata)
    return path


def _places(name: str, module: nn.Module, ones, kind: str) -> dict[tuple, tuple]:
    """The path of each linear map by (layout, name in it)."""
    pieces = _pieces(name, module, ones, kind)[0]
    return {(kind, _module(piece)): piece.path[1:-1] for piece in pieces}


def _diffusers(key: str, places: Mapping[tuple, Any]) -> tuple[str, str] | None:
    """(layout, name) of a name in diffusers' layout, or None."""
    # Names of transformers may lack CLIP's "text_model.".
    names_there = [("diffusers", key), ("diffusers", f"text_model.{key}")]
    return next((place for place in names_there if place in places), None)


def _known(key: str, places: Mapping[tuple, Any], pair: Pair) -> tuple[str, str]:
    """(layout, name) of a name in any layout; UserError if it is not a linear map."""
    if place := _diffusers(key, places):
        return place
    # kohya's names have underscores for dots, so dots are lost: compare without.
    flat = {name.replace(".", "_"): (kind, name) for kind, name in places}
    if (place := flat.get(key.replace(".", "_"))) is not None:
        return place
    guess = near(key, [name for _, name in places])
    hint = f'; did you mean "{guess}"?' if guess else ""
    raise UserError(f"{pair.down.path}: {key} is not a linear layer of the model{hint}")


# --- a and b as kernels, which the key tables map: the rank is a's output axis and b's
# input axis. In b of fused maps the rank must come before the groups: see _turn.


def _pseudo(shapes: Mapping[tuple, tuple], ranks: Mapping[tuple, int]):
    """(a, turned b) of zeros for kernels of these shapes, by path."""
    a, b = {}, {}
    for path, shape in shapes.items():
        first, second = layout(path, len(shape)).shapes(shape, ranks[path])
        a[path] = np.zeros(first, np.float32)
        b[path] = _turn(path, shape, np.zeros(second, np.float32))
    return a, b


def _turn(path: tuple, shape: tuple, b: np.ndarray) -> np.ndarray:
    """b with groups and rank exchanged, if it has groups; its own inverse."""
    axes = layout(path, len(shape))
    return np.swapaxes(b, axes.layers, axes.layers + 1) if axes.groups else b


def _pieces(
    name: str, module: nn.Module, matrices, layout: str = "diffusers"
) -> tuple[list[Piece], list[Piece]]:
    # The component's own table, with the kinds of rows changed for a and for b.
    groups = COMPONENTS[name].table(module)
    sides = []
    for by_path, change in zip(matrices, (_first, _second)):
        table = [
            group._replace(rows=[_changed(row, change) for row in group.rows])
            for group in groups
        ]
        leaves = nested({("params", *path, "kernel"): x for path, x in by_path.items()})
        try:
            pieces = key_mapping.pieces(leaves, table, layout)
        except KeyError as error:
            raise UserError(
                f"LoRA of {error.args[0]}: diffusers' layout has no such module"
            ) from None
        # Without a key: a map that the layout lacks, such as CLIP-L's projection.
        sides.append([piece for piece in pieces if piece.key is not None])
    return sides[0], sides[1]


def _changed(row: Row, change: Callable[[Kind], Kind]) -> Row:
    other = row.original_kind
    return row._replace(
        kind=change(row.kind), original_kind=None if other is None else change(other)
    )


def _first(kind: Kind) -> Kind:
    """Kind of lora_A, whose outputs are the rank: there are no halves to exchange."""
    return kind._replace(swap=False)


def _second(kind: Kind) -> Kind:
    """Kind of lora_B; a convolution's has (out, rank, 1, 1), a 1 x 1 convolution."""
    plain = kind in (
        key_mapping.LINEAR,
        key_mapping.SWAPPED,
        key_mapping.MERGING,
        key_mapping.AS_IS,
    )
    return kind if plain else key_mapping.CONV_1X1


def _module(piece: Piece) -> str:
    return piece.key.removesuffix(".weight")


def _matrix(pair: Pair, side: int, piece: Piece, rank: int) -> np.ndarray:
    """A pair's down (side 0) or up (1) in float32, padded to the kernel's rank."""
    # The original layout fuses q, k and v: one down for all, repeated for each of ours.
    tensor, shape = pair[side], list(piece.file_shape)
    fused = 1 if side else shape[0] // rank  # 3 for qkv in the original layout
    shape[side] = pair.rank
    if list(tensor.shape) != shape:
        raise UserError(
            f"{tensor.path}: {_module(piece)}.lora_{'AB'[side]} is"
            f" {list(tensor.shape)}, expected {shape}"
        )
    if tensor.dtype.kind in "biu":
        raise UserError(
            f"{tensor.path}: {_module(piece)}.lora_{'AB'[side]} is of {tensor.dtype};"
            " expected floats, a quantized LoRA is not supported"
        )
    x = tensor.read()
    if not finite(x):
        raise UserError(f"{tensor.path}: {_module(piece)}: values that are not finite")
    padding = [(0, 0)] * x.ndim
    padding[side] = (0, rank - pair.rank)  # zeros add nothing to a b
    x = np.pad(x.astype(np.float32), padding)
    return np.concatenate([x] * fused) if fused > 1 else x


def _tensors(
    name: str, module: nn.Module, lora: dict, alpha: float, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """lora_A and lora_B by name, with alpha / rank in lora_B."""
    # In lora_B, so that readers that know of no alpha agree with those that do.
    a, b = {}, {}
    for path, pair in modules(lora, "a"):
        axes = layout_of(path, pair)
        up = _host(pair["b"]).astype(np.float32)
        up = up * np.float32(
            alpha / up.shape[axes.layers + axes.groups] if alpha else 1
        )
        a[path] = _host(pair["a"])
        b[path] = np.swapaxes(up, axes.layers, axes.layers + 1) if axes.groups else up
    tensors = {}
    for side, tree, pieces in zip("AB", (a, b), _pieces(name, module, (a, b))):
        for piece in pieces:
            part = piece.write(tree[piece.path[1:-1]][piece.index])
            tensors[f"{_module(piece)}.lora_{side}.weight"] = part.astype(dtype)
    return tensors


def _host(x: Any) -> np.ndarray:
    # A collective for sharded arrays: hence all processes must call save.
    return x if isinstance(x, np.ndarray) else sharded_load.fetch(x)


def _peft(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """PEFT's configuration, in which every alpha is the rank: the scale is 1."""
    end = ".lora_A.weight"
    ranks = {
        key.removesuffix(end): len(x) for key, x in tensors.items() if key.endswith(end)
    }
    # PEFT has one rank, and patterns for modules of another.
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{module}": rank for module, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }
