"""Adapters from files, in the common form of params/adapters.py.

`read` opens a file's header: the tensors of each component's layers. `leaves` finds the
layers in a model by its key tables and gives each changed parameter, one at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed
from sd3_jax.params import lora, parametrization
from sd3_jax.params.adapters import Factors, Full
from sd3_jax.weights import (
    adapter_kinds,
    adapter_layers,
    adapter_names,
    factor_pieces,
    peft_config,
    safetensors,
    sharded_load,
)
from sd3_jax.weights.adapter_kinds import Update
from sd3_jax.weights.adapter_layers import Layers, Target
from sd3_jax.weights.key_mapping import Piece
from sd3_jax.weights.peft_config import Settings
from sd3_jax.weights.safetensors import Tensor, Tensors

FILE = "pytorch_lora_weights.safetensors"  # diffusers'
PEFT_FILE = "adapter_model.safetensors"
WANTED = ("*.safetensors", peft_config.CONFIG)  # files to download from the hub
Path = tuple[str, ...]


def read(path: epath.PathLike) -> dict[str, Layers]:
    """Layers by component of an adapter file, or of a folder with one.

    Components are "denoiser", "clip_l", "clip_g" and "t5". Only the header and alphas
    are read. Raises UserError for names that are not known, with their number and the
    first ten, and for an adapter of another model.
    """
    path = _file(epath.Path(path))
    tensors, metadata = safetensors.open_file(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors; expected those of an adapter")
    settings = _settings(path, tensors, metadata)
    # A bare MODULE.weight is a whole weight only where the configuration says so;
    # elsewhere it is a model's file that was taken for an adapter.
    whole = {name for name, x in settings.items() if x.whole}
    names = adapter_names.parse(str(path), tensors, whole=whole)
    if len(adapters := {x.adapter for x in names.values()} - {None}) > 1:
        raise UserError(
            f"{path}: holds several adapters, {listed(sorted(adapters))}; expected one"
        )
    # --- tensors by layer
    roles: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, (component, module, role, _) in names.items():
        layer = roles.setdefault(component, {}).setdefault(module, {})
        # kohya's and PEFT's name of one factor in one file: neither may win in silence.
        if role in layer:
            raise UserError(f"{path}: {key}: {module} has two tensors of this kind")
        layer[role] = tensors[key]
    return {
        component: Layers(
            path,
            {
                module: _update(path, module, layer, settings[component])
                for module, layer in layers.items()
            },
        )
        for component, layers in roles.items()
    }


def load(
    layers: Layers, name: str, module: nn.Module, params: Any
) -> dict[Path, Factors | Full]:
    """All parameters that a file changes in component `name`, in host memory.

    See leaves.
    """
    return dict(leaves(layers, name, module, params))


def files_of(path: epath.PathLike) -> list[epath.Path]:
    """The files that decide what an adapter does: tensors, and PEFT's configuration."""
    file = _file(epath.Path(path))
    beside = file.parent / peft_config.CONFIG
    return [file, beside] if beside.exists() else [file]


def leaves(
    layers: Layers, name: str, module: nn.Module, params: Any
) -> Iterator[tuple[Path, Factors | Full]]:
    """(path in `params`, change) of each parameter that a file changes, float32.

    A linear map with a low-rank update in all its layers has Factors; what else there
    is, Full. Layers of a stack, and q, k or v, that the file lacks are zero; smaller
    ranks are padded with zeros. `params` may be shapes unless the file has DoRA or
    whole weights, whose change depends on the base's values. Each change is computed
    when it is asked for, so that a caller may place one before the next is read.
    Raises UserError, before the first, for layers that do not fit the model, with their
    number and the first ten.
    """
    by_leaf: dict[Path, list[Target]] = {}
    for target in adapter_layers.targets(layers, name, module, params):
        by_leaf.setdefault(target.piece.path[1:], []).append(target)

    # A generator of its own, so that targets are checked when `leaves` is called and
    # not at the first change.
    def changes():
        for path, targets in by_leaf.items():
            leaf = _leaf(params, path)
            if _all_low_rank(path, leaf, targets):
                yield path, _factors(path, leaf, targets, name, module)
            else:
                yield path, _full(path, leaf, targets)

    return changes()


# --- the file


def _file(path: epath.Path) -> epath.Path:
    """The adapter's file in a folder, or the path itself if it is a file."""
    if not path.is_dir():
        return path
    known = [path / name for name in (FILE, PEFT_FILE) if (path / name).exists()]
    if len(known) == 2:
        raise UserError(f"{path}: holds {FILE} and {PEFT_FILE}; name one of the two")
    if known:
        return known[0]
    # PEFT saves adapters that have a name in a folder of that name.
    config = peft_config.CONFIG
    inner = [x for x in files.names(path) if (path / x / config).exists()]
    hint = f"; name {path / inner[0]}" if inner else ""
    return safetensors.only_file(path, f"{FILE}, {PEFT_FILE}", hint)


def _settings(
    path: epath.Path, tensors: Tensors, metadata: Mapping[str, str]
) -> dict[str, Settings]:
    """Settings by component from the file's metadata or the file beside it."""
    wrapped = {key for key in tensors if key.startswith(adapter_names.WRAPPED)}
    if wrapped and len(wrapped) < len(tensors):
        raise UserError(
            f"{path}: holds names with {adapter_names.WRAPPED} and names without;"
            " expected one kind"
        )
    beside = path.parent / peft_config.CONFIG
    if peft_config.METADATA in metadata or not (wrapped or path.name == PEFT_FILE):
        return peft_config.of_metadata(path, metadata)
    if beside.exists():
        return peft_config.of_folder(beside)
    # Other tools take PEFT's names and add alphas, or whole differences without any.
    if any(key.endswith((".alpha", ".diff")) for key in tensors):
        return peft_config.of_metadata(path, metadata)
    raise UserError(
        f"{path}: {peft_config.CONFIG} is missing beside it; PEFT stores alpha there"
    )


def _update(
    path: epath.Path, module: str, tensors: dict[str, Tensor], settings: Settings
) -> Update:
    """A layer's update with its scale; UserError if tensors are missing."""
    if fault := adapter_kinds.incomplete(tensors):
        raise UserError(f"{path}: {module} {fault}")
    # Applied as a plain LoRA it would be another picture, and nobody would know why.
    if settings.dora and "A" in tensors and "magnitude" not in tensors:
        raise UserError(
            f"{path}: {module} has no lora_magnitude_vector, but its configuration has"
            " use_dora"
        )
    alpha = tensors.pop("alpha", None)
    rank = adapter_kinds.rank(tensors)
    if alpha is None:
        # Only LoKr has a scale without a rank, and only in PEFT.
        scaled = rank is not None or "lokr_w1" in tensors
        return Update(tensors, settings.scale(module, rank) if scaled else 1.0)
    # Read with the header: alphas are single numbers, and their faults show before any
    # weight is loaded.
    value = alpha.read().astype(np.float64).reshape(-1)
    # A LoKr of two whole matrices may have any: LyCORIS takes 1e10 to ask for these.
    most = np.inf if rank is None else peft_config.LARGEST
    if value.size != 1 or not np.isfinite(value[0]) or abs(value[0]) > most:
        raise UserError(
            f"{path}: {module}.alpha: expected one finite number,"
            f" {peft_config.LARGEST:g} at most"
        )
    # LyCORIS and ComfyUI do not scale two whole matrices.
    return Update(tensors, 1.0 if rank is None else float(value[0]) / rank)


# --- the changes


def _leaf(params: Any, path: Path) -> Any:
    for name in path:
        params = params[name]
    return params


def _all_low_rank(path: Path, leaf: Any, targets: list[Target]) -> bool:
    """Whether Factors can hold all changes of a leaf."""
    if path[-1] != "kernel" or lora.layout(path[:-1], len(leaf.shape)) is None:
        return False
    # Names of both layouts may mean the same q, whose changes then add up.
    return len({target.layout for target in targets}) == 1 and all(
        target.part == "weight" and target.update.low_rank for target in targets
    )


def _factors(
    path: Path, leaf: Any, targets: list[Target], name: str, module: nn.Module
) -> Factors:
    """One rank for the kernel: the largest of its layers' and of q, k and v."""
    # With LoCon's middle matrix the two ranks may differ: up's counts.
    # A stack has one array for all its layers, so the largest rank sets its shape.
    rank = max(target.update.tensors["B"].shape[1] for target in targets)
    by_layer = {target.module: target for target in targets}
    # Zeros stand for layers that the file does not have.
    sides = factor_pieces.zeros(path[:-1], tuple(leaf.shape), rank)
    layout = targets[0].layout
    pieces = factor_pieces.pieces(name, module, path[:-1], sides, layout)
    for side, x in enumerate(sides):
        for piece in pieces[side]:
            if (target := by_layer.get(factor_pieces.layer(piece))) is not None:
                x[piece.index] = piece.read(_matrix(target, side, rank, piece))
    a, turned = sides
    return Factors(a, factor_pieces.turn(path[:-1], a, turned))


def _matrix(target: Target, side: int, rank: int, piece: Piece) -> np.ndarray:
    """An update's down (side 0) or up (1) as `piece` of a kernel's a or b."""
    update = target.update
    x = adapter_kinds.factors(update, target.piece.file_shape)[side]
    if side:
        x = _finite(update.scale * x, target)  # alpha / rank is in b alone
    padding = [(0, 0)] * x.ndim
    padding[side] = (0, rank - x.shape[side])  # zeros add nothing to a b
    x = np.pad(x, padding)
    # The original layout fuses q, k and v: one down for all, repeated for each of ours.
    fused = 1 if side else piece.file_shape[0] // rank
    x = np.concatenate([x] * fused) if fused > 1 else x
    return x.reshape(piece.file_shape)


def _full(path: Path, leaf: Any, targets: list[Target]) -> Full:
    """The sum of all changes of a leaf; what the file lacks is zero."""
    # In host memory, one stack at a time: the caller places it before it asks for the
    # next.
    total = np.zeros(leaf.shape, np.float32)
    values: list[np.ndarray] = []  # of the leaf, read once and only if needed

    def base(piece: Piece) -> Callable[[], np.ndarray]:
        def read_base() -> np.ndarray:
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ValueError(f"{'/'.join(path)}: needs the base's values")
            if not values:
                array = jax.jit(parametrization.array)(leaf)
                values.append(sharded_load.fetch(array).astype(np.float32))
            return piece.write(values[0][piece.index])

        return read_base

    # Several changes of one piece add up: a LoRA and a difference, or q alone and in
    # the fused layer.
    for target in targets:
        piece, update = target.piece, target.update
        change = adapter_kinds.delta(update, target.part, piece.file_shape, base(piece))
        total[piece.index] += piece.read(_finite(change, target))
    return Full(total)


def _finite(x: np.ndarray, target: Target) -> np.ndarray:
    # Finite factors may overflow: kohya's alpha has no bound.
    if not np.isfinite(x).all():
        path = next(iter(target.update.tensors.values())).path
        raise UserError(
            f"{path}: {target.module}: overflows float32 with alpha / rank ="
            f" {target.update.scale:g}"
        )
    return x
