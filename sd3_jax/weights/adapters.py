"""What a LoRA file of diffusers' layout holds, by component and module.

Of each linear map it has lora_A (rank, in) and lora_B (out, rank), and in its metadata
PEFT's configuration; without that alpha is the rank. Any map may be missing, and has a
rank and an alpha of its own.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath

from sd3_jax.errors import UserError, near
from sd3_jax.outside import parse_json, shown
from sd3_jax.weights import safetensors
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.safetensors import Tensor

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # of the file: PEFT's configuration, as JSON
PREFIXES = {  # what diffusers loads for SD3
    COMPONENTS[name].folder: name for name in ("denoiser", "clip_l", "clip_g")
}
SIDE = re.compile(r"(.+)\.(lora_A|lora_B|lora(?:_linear_layer)?\.(?:down|up))\.weight")
OLD = re.compile(
    r"(.+\.)to_(q|k|v|out)_lora\.(down|up)\.weight"
)  # before diffusers 0.20
REFUSED = {  # what in a name means that more than A and B is to be computed
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "lora_B.bias": "a LoRA with biases",
    "lora_unet_": "kohya's form",
    "lora_te": "kohya's form",
    "lora_down": "kohya's form",
    "lora_up": "kohya's form",
}


class Pair(NamedTuple):
    """One linear map's matrices in a file: its weight gains scale * up down."""

    down: Tensor  # (rank, in); of a convolution (rank, in, p, p)
    up: Tensor  # (out, rank); of a convolution (out, rank, 1, 1)
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


Pairs = dict[str, Pair]  # by diffusers' name of the module


def read(path: epath.PathLike) -> dict[str, Pairs]:
    """What a file, or a folder with one, adapts: by component, "denoiser" or a CLIP's.

    It may be of the PEFT form or of diffusers' older ones. Raises UserError for any
    tensor that is no part of a pair.
    """
    path = _file(epath.Path(path))
    tensors, metadata = safetensors.open_file(path)
    config = _config(path, metadata)
    bare = not any(key.split(".")[0] in PREFIXES for key in tensors)
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        *place, side = _place(path, key, bare)
        sides.setdefault(tuple(place), {})[side] = tensor
    found: dict[str, Pairs] = {}
    for (prefix, module), pair in sides.items():
        if len(pair) < 2:
            raise UserError(f"{path}: {module} has lora_{min(pair)} alone, wanted both")
        down, up = pair["A"], pair["B"]
        whole = len(down.shape) == len(up.shape) >= 2
        if not whole or down.shape[0] != up.shape[1] or not down.shape[0]:
            raise UserError(
                f"{path}: {module}: lora_A {list(down.shape)}, lora_B {list(up.shape)}:"
                " wanted (rank, in) and (out, rank)"
            )
        scale = _scale(path, config.get("" if bare else prefix, {}), module, down)
        found.setdefault(PREFIXES[prefix], {})[module] = Pair(down, up, scale)
    if not found:
        raise UserError(f"{path}: holds no tensors, wanted lora_A and lora_B")
    return found


def _file(path: epath.Path) -> epath.Path:
    if not path.is_dir():
        return path
    if (path / FILE).exists():
        return path / FILE
    files = sorted(p for p in path.iterdir() if p.name.endswith(".safetensors"))
    if len(files) != 1:
        raise UserError(
            f"{path}: wanted {FILE} or one other .safetensors file; it has"
            f" {len(files)} of those"
        )
    return files[0]


def _config(path: epath.Path, metadata: Mapping[str, str]) -> dict[str, dict]:
    """PEFT's configuration by a component's prefix, "" where names have none."""
    try:
        flat = parse_json(metadata.get(METADATA, "{}"))
        if not isinstance(flat, dict):
            raise ValueError("wanted a JSON object")
    except ValueError as error:
        raise UserError(f"{path}: {METADATA}: {error}") from None
    found: dict[str, dict] = {"": flat}
    for key, value in flat.items():
        prefix, _, name = key.partition(".")
        found.setdefault(prefix, {})[name] = value
    return found


def _place(path: epath.Path, key: str, bare: bool) -> tuple[str, str, str]:
    """(prefix, module, "A" or "B") of a tensor's name."""
    for mark, kind in REFUSED.items():
        if mark in key:
            raise UserError(
                f"{path}: {key}: {kind}, which diffusers does not load for SD3 either"
                if kind.startswith("kohya")
                else f"{path}: {key}: {kind}; wanted lora_A and lora_B alone"
            )
    prefix, _, name = key.partition(".")
    if bare:
        prefix, name = "transformer", key
    if prefix not in PREFIXES:
        guess = near(prefix, PREFIXES)
        hint = f'; did you mean "{guess}"?' if guess else ""
        raise UserError(
            f"{path}: {key} is of none of {', '.join(PREFIXES)}, which may have a"
            f" LoRA{hint}"
        )
    name = name.replace(".processor.", ".")
    if old := OLD.fullmatch(name):
        before, which, side = old.groups()
        clip = PREFIXES[prefix] != "denoiser"
        last = (
            {"out": "out_proj"}.get(which, f"{which}_proj") if clip else f"to_{which}"
        )
        name = f"{before}{last}{'.0' if last == 'to_out' else ''}.lora.{side}.weight"
    match = SIDE.fullmatch(name)
    if match is None:
        raise UserError(
            f"{path}: {key} is not known; wanted MODULE.lora_A.weight and"
            " MODULE.lora_B.weight"
        )
    return prefix, match[1], "A" if match[2].endswith(("A", "down")) else "B"


def _scale(path: epath.Path, config: dict, module: str, down: Tensor) -> float:
    """alpha / rank, as PEFT's configuration has it; 1 without one."""
    for option in ("use_dora", "lora_bias"):
        if config.get(option):
            raise UserError(f"{path}: {METADATA}: {option}: wanted lora_A and lora_B")
    rank = down.shape[0]
    alpha = config.get("lora_alpha", rank)
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        alpha = float(alpha)
    except (re.error, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: {METADATA}: alpha: {shown(error)}") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
