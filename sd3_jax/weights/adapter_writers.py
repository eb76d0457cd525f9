"""Write adapters in the names of diffusers, PEFT, kohya or ComfyUI.

alpha / rank is in the second factor, and alpha is the rank: readers that know of no
alpha agree with those that do.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import linen as nn

from sd3_jax.errors import UserError, nearest
from sd3_jax.params import lora
from sd3_jax.params.adapters import Adapter, Factors, Full
from sd3_jax.weights import (
    adapter_files,
    factor_pieces,
    key_mapping,
    peft_config,
    safetensors,
    sharded_load,
)
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.safetensors import Entry

PART = {"weight": "diff", "bias": "diff_b"}  # ComfyUI's names of whole differences


class Naming(NamedTuple):
    """How a tool names the tensors of an adapter.

    `layout` is that of the denoiser's layers, `prefixes` are by component, `sides` the
    ends of both factors' names. `flat` names have underscores for dots.
    """

    file: str
    layout: str
    prefixes: Mapping[str, str]
    sides: tuple[str, str]
    flat: bool = False
    alpha: bool = False
    whole: bool = False  # whether it has whole differences


DOWN_UP = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
NAMINGS = {
    # diffusers loads none of T5 (SD3LoraLoaderMixin._lora_loadable_modules).
    "diffusers": Naming(
        adapter_files.FILE,
        "diffusers",
        {
            name: f"{COMPONENTS[name].folder}."
            for name in ("denoiser", "clip_l", "clip_g")
        },
        A_B,
    ),
    "peft": Naming(
        adapter_files.PEFT_FILE,
        "diffusers",
        dict.fromkeys(peft_config.FOLDERS.values(), "base_model.model."),
        A_B,
    ),
    "kohya": Naming(
        "kohya_lora.safetensors",
        "original",
        {
            "denoiser": "lora_unet_",
            "clip_l": "lora_te1_",
            "clip_g": "lora_te2_",
            "t5": "lora_te3_",
        },
        DOWN_UP,
        flat=True,
        alpha=True,
        whole=True,
    ),
    "comfyui": Naming(
        "comfyui_lora.safetensors",
        "original",
        {
            "denoiser": "diffusion_model.",
            "clip_l": "text_encoders.clip_l.transformer.",
            "clip_g": "text_encoders.clip_g.transformer.",
            "t5": "text_encoders.t5xxl.transformer.",
        },
        DOWN_UP,
        whole=True,
    ),
}


def save(
    path: epath.PathLike,
    adapter: Adapter,
    modules: Mapping[str, nn.Module],
    *,
    naming: str = "diffusers",
    dtype: Any = np.float32,
    facts: Mapping[str, str] | None = None,
    compact: bool = False,
) -> epath.Path:
    """Write an adapter as a .safetensors file, or in a folder under the tool's name.

    `modules` are by component; `facts` are added to the file's metadata. `compact`
    leaves out layers and ranks that add nothing, which reading has padded. PEFT's
    adapter_config.json is written beside its file. All processes must call. Raises
    UserError for what the naming cannot hold.
    """
    if naming not in NAMINGS:
        raise UserError(f'adapter naming "{naming}"{nearest(naming, NAMINGS)}')
    names = NAMINGS[naming]
    _check(adapter, naming)
    path = epath.Path(path)
    path = path if path.name.endswith(".safetensors") else path / names.file
    # --- tensors by name, and the ranks that PEFT's configuration lists
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, dict[str, int]] = {}
    for name, changes in adapter.items():
        for layer, ends in _layers(name, modules[name], changes, names, compact):
            # PEFT builds its layers from the ranks in the configuration, before it
            # looks at shapes; kohya and ComfyUI take ranks from the tensors.
            if "A" in ends and not names.whole:
                ranks.setdefault(name, {})[layer] = len(ends["A"])
            tensors |= _named(names, name, layer, ends)
    tensors = {key: _cast(path, key, x, np.dtype(dtype)) for key, x in tensors.items()}
    if not tensors:
        raise UserError(f"{path}: the adapter changes nothing; nothing to write")
    # --- one process writes what all have gathered
    if jax.process_index() == 0:
        metadata = dict(facts or {})
        if naming == "diffusers":
            metadata[peft_config.METADATA] = _json(_flattened(ranks))
        entries = {
            key: Entry(x.dtype, x.shape, lambda x=x: x) for key, x in tensors.items()
        }
        safetensors.write_file(path, entries, metadata)
        if naming == "peft":
            config = peft_config.of_ranks(*ranks.values())
            (path.parent / peft_config.CONFIG).write_text(_json(config))
    return path


def _check(adapter: Adapter, naming: str) -> None:
    """UserError if the naming has no names for a part of the adapter."""
    names = NAMINGS[naming]
    if foreign := [name for name in adapter if name not in names.prefixes]:
        raise UserError(
            f"the adapter changes {foreign[0]}, which {naming} does not load; write it"
            " for kohya or comfyui"
        )
    if naming == "peft" and len(adapter) > 1:
        raise UserError(
            f"the adapter changes {', '.join(adapter)}, but PEFT's folder holds one"
            " model's; write it for diffusers"
        )
    whole = [
        f"{name}: {'/'.join(path)}"
        for name, changes in adapter.items()
        for path, change in changes.items()
        if isinstance(change, Full)
    ]
    if whole and not names.whole:
        raise UserError(
            f"the adapter changes {len(whole)} weights other than by low-rank factors"
            f" ({whole[0]} first), which {naming} does not load; write it for kohya or"
            " comfyui"
        )


def _layers(
    name: str, module: nn.Module, changes: Mapping, names: Naming, compact: bool
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(layer's name, tensors by "A", "B", "diff" or "diff_b") of a component."""
    for path, change in changes.items():
        if isinstance(change, Full):
            yield from _whole(name, module, path, change, names.layout)
        else:
            yield from _pairs(name, module, path, change, names, compact)


def _pairs(
    name: str,
    module: nn.Module,
    path: tuple[str, ...],
    change: Factors,
    names: Naming,
    compact: bool,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    a, b = (_host(x).astype(np.float32) for x in change)
    sides = a, factor_pieces.turn(path[:-1], a, b)
    try:
        pieces = factor_pieces.pieces(name, module, path[:-1], sides, names.layout)
    except KeyError as error:
        raise UserError(
            f"LoRA of {error.args[0]}: the published layouts have no such module"
        ) from None
    # Both sides list the same layers in the same order: their rows are the same.
    for first, second in zip(*pieces):
        down, up = (
            piece.write(x[piece.index]) for piece, x in zip((first, second), sides)
        )
        # Our q, k and v have a pair each; the original layout has one for all three.
        down, up = _joined(down, up)
        if compact:
            down, up = _compacted(down, up)
        if len(down):
            yield factor_pieces.layer(first), {"A": down, "B": up}


def _joined(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One pair for q, k and v, whose factors lie one after another in down.

    If they share a factor it is written once. Otherwise up is block-diagonal, as that
    of kohya's split_qkv (networks/lora_sd3.py).
    """
    rank = up.shape[1]
    groups = len(down) // rank
    if groups == 1:
        return down, up
    parts = np.split(down, groups)
    if all(np.array_equal(parts[0], part) for part in parts):
        return parts[0], up
    blocks = np.zeros((len(up), groups * rank), up.dtype)
    for i, block in enumerate(np.split(up, groups)):
        rows = slice(i * len(block), (i + 1) * len(block))
        blocks[rows, i * rank : (i + 1) * rank] = block
    return down, blocks


def _compacted(down: np.ndarray, up: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair without ranks that add nothing."""
    # Reading pads ranks with zeros in both; one of the two is enough to add nothing.
    used = np.any(down.reshape(len(down), -1), 1)
    used &= np.any(np.moveaxis(up, 1, 0).reshape(len(down), -1), 1)
    return down[used], up[:, used]


def _whole(
    name: str, module: nn.Module, path: tuple[str, ...], change: Full, layout: str
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    delta = _host(change.delta).astype(np.float32)
    leaves = lora.nested({("params", *path): delta})
    table = COMPONENTS[name].table(module)
    for piece in key_mapping.pieces(leaves, table, layout):
        if piece.key is None:
            continue
        layer, _, part = piece.key.rpartition(".")
        x = np.ascontiguousarray(piece.write(delta[piece.index]))
        if x.any():  # zero where the file that it was read from has no such layer
            yield layer, {PART[part]: x}


def _named(
    names: Naming, name: str, layer: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    stem = names.prefixes[name] + (layer.replace(".", "_") if names.flat else layer)
    ends = dict(zip("AB", names.sides))
    named = {f"{stem}.{ends.get(role, role)}": x for role, x in tensors.items()}
    # kohya's scripts look the alpha of each layer up and fail without it
    # (create_network_from_weights); alpha = rank means a scale of 1.
    if names.alpha and "A" in tensors:
        named[f"{stem}.alpha"] = np.full((), len(tensors["A"]), np.float32)
    return named


def _cast(path: epath.Path, key: str, x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    # float16 ends at 65504, which b with a large alpha passes.
    with np.errstate(over="ignore"):  # told below
        cast = np.ascontiguousarray(x.astype(dtype)).reshape(x.shape)
    if not np.isfinite(cast.astype(np.float32)).all():
        raise UserError(
            f"{path}: {key} overflows {dtype}; set --config.convert.dtype=bfloat16"
        )
    return cast


def _flattened(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Configurations of all components, as diffusers keeps them in metadata."""
    return {
        f"{COMPONENTS[name].folder}.{field}": value
        for name, of_layers in ranks.items()
        for field, value in peft_config.of_ranks(of_layers).items()
    }


def _json(x: Any) -> str:
    return json.dumps(x, indent=2, sort_keys=True)


def _host(x: Any) -> np.ndarray:
    # A collective for sharded arrays: hence all processes must call save.
    return x if isinstance(x, np.ndarray) else sharded_load.fetch(x)
