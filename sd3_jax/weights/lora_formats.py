"""Read LoRA files of diffusers, PEFT and kohya, by component and module.

A file has lora_A (rank, in) and lora_B (out, rank) for each linear map that it adapts,
each with its own rank and alpha. diffusers keeps alpha in the file's metadata (without
it, alpha is the rank), PEFT in adapter_config.json beside the file, kohya in a tensor
for each map.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError, near
from sd3_jax.foreign_text import listed, shown
from sd3_jax.weights import safetensors
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.safetensors import Tensor, Tensors

FILE = "pytorch_lora_weights.safetensors"
LARGEST = 1e6  # rank or alpha in a configuration, at most
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
WANTED = ("*.safetensors", PEFT_CONFIG)  # files to download from the hub
METADATA = "lora_adapter_metadata"  # of the file: PEFT's configuration, as JSON
PREFIXES = {  # what diffusers loads for SD3
    COMPONENTS[name].folder: name for name in ("denoiser", "clip_l", "clip_g")
}
WRAPPED = "base_model.model."  # PEFT's prefix of all names that it saves
KOHYA = {  # prefixes of kohya's and OneTrainer's names and, with dots, of ComfyUI's
    "diffusion_model.": "transformer",
    "lora_unet_": "transformer",
    "lora_transformer_": "transformer",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
CLIP = ("text_model.", "encoder.layers.", "text_projection")  # names without a prefix
T5 = ("encoder.block.", "shared.", "lora_te3_")
ADAPTER = r"(?:\.(?P<adapter>\w+))?"  # PEFT's adapter name, where it was left in
SIDE = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora(?:_linear_layer)?\.(?:down|up))"
    + ADAPTER
    + r"\.weight"
)
OLD = re.compile(
    r"(.+\.)to_(q|k|v|out)_lora\.(down|up)\.weight"
)  # before diffusers 0.20
# Parts of names by which a file needs more than A and B: read as a plain LoRA, it
# would give wrong pictures.
REFUSED = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_B.bias": "a LoRA with biases",
    "lora_mid": "LoCon's third matrix",
    "lora_embedding_": "a LoRA of embeddings",
    "modules_to_save.": "a module that is saved whole",
}
# PEFT's options that change nothing once A and B are there, or that Settings reads.
NEUTRAL = set(
    "peft_type task_type auto_mapping base_model_name_or_path revision peft_version"
    " inference_mode r lora_alpha rank_pattern alpha_pattern use_rslora target_modules"
    " exclude_modules layers_to_transform layers_pattern lora_dropout eva_config"
    " megatron_core qalora_group_size runtime_config ensure_weight_tying".split()
)
# Values of init_lora_weights that leave the base as it is. Others (PiSSA, OLoRA, ...)
# change the base's weights when training begins: A and B are not the whole update.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")


class Pair(NamedTuple):
    """One linear map's matrices in a file: the weight becomes W + scale * up down."""

    down: Tensor  # (rank, in); of a convolution (rank, in, p, p)
    up: Tensor  # (out, rank); of a convolution (out, rank, 1, 1)
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


Pairs = dict[str, Pair]  # by diffusers' name of the module


class Settings(NamedTuple):
    """The ranks and alphas of PEFT's configuration.

    Patterns are regular expressions for the end of a module's name; as in PEFT, the
    first that matches counts.
    """

    where: str
    rank: float | None = None
    alpha: float | None = None
    ranks: Mapping[str, float] = {}
    alphas: Mapping[str, float] = {}
    rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha defaults to the rank.

        Raises UserError if the configuration's rank is not the tensors'.
        """
        # A rank that disagrees means that the configuration is of another file.
        configured = self._of(self.ranks, module, self.rank)
        if configured not in (None, rank):
            raise UserError(
                f"{self.where}: {module} has rank {configured:g}, but its tensors have"
                f" {rank}"
            )
        alpha = self._of(self.alphas, module, self.alpha)
        alpha = rank if alpha is None else alpha
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def _of(self, patterns: Mapping[str, float], module: str, usual: Any) -> Any:
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                reason = f"{shown(pattern)}: {shown(error)}"
                raise UserError(f"{self.where}: pattern {reason}") from None
        return usual


def read(path: epath.PathLike) -> dict[str, Pairs]:
    """Pairs of a file, or of a folder with one, by component and module.

    Components are "denoiser", "clip_l" and "clip_g". Raises UserError for a tensor that
    is not part of a pair, and for kinds of adapters that are not plain LoRA.
    """
    # --- open, and strip PEFT's prefix
    path = _file(epath.Path(path))
    tensors, metadata = safetensors.open_file(path)
    if not tensors:
        raise UserError(f"{path}: holds no tensors; expected lora_A and lora_B")
    names = {key.removeprefix(WRAPPED): key for key in tensors}
    if len(names) < len(tensors):
        raise UserError(
            f"{path}: holds names with {WRAPPED} and names without; expected one kind"
        )
    wrapped = path.name == PEFT_FILE or any(name != key for name, key in names.items())
    # --- kohya's alphas leave `names`: what remains are matrices
    alphas = _take_alphas(path, tensors, names)
    bare = not any(name.split(".")[0] in PREFIXES for name in names)
    sides = _sides(path, {name: tensors[key] for name, key in names.items()}, bare)
    # --- pairs with their scales
    settings = _settings_of(path, metadata, wrapped, bare)
    pairs: dict[str, Pairs] = {}
    for (prefix, module), pair in sides.items():
        _require_pair(path, module, pair)
        rank = pair["A"].shape[0]
        if (alpha := alphas.pop(module, None)) is not None:
            scale = alpha / rank
        else:
            scale = settings[prefix].scale(module, rank)
        component = pairs.setdefault(PREFIXES[prefix], {})
        if (name := _without_kohya(module)) in component:
            raise UserError(f"{path}: {module}: {name} appears twice")
        component[name] = Pair(pair["A"], pair["B"], scale)
    if alphas:
        raise UserError(f"{path}: {next(iter(alphas))} has only alpha")
    return pairs


def _sides(
    path: epath.Path, tensors: Tensors, bare: bool
) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The "A" and "B" of each (prefix, module), all of one adapter."""
    owner = _owner(path, tensors) if bare else None  # of names without a prefix
    sides: dict[tuple[str, str], dict[str, Tensor]] = {}
    adapters = set()
    for name, tensor in tensors.items():
        prefix, module, side, adapter = _place(path, name, owner)
        pair = sides.setdefault((prefix, module), {})
        if side in pair:
            raise UserError(f"{path}: {name}: {module} has two of lora_{side}")
        pair[side] = tensor
        adapters.add(adapter)
    if len(adapters) > 1:
        names = listed(sorted(map(str, adapters)))
        raise UserError(f"{path}: holds several adapters, {names}; expected one")
    return sides


def _require_pair(path: epath.Path, module: str, pair: Mapping[str, Tensor]) -> None:
    if len(pair) < 2:
        raise UserError(
            f"{path}: {module} has only lora_{min(pair)}; expected lora_A and lora_B"
        )
    down, up = pair["A"].shape, pair["B"].shape
    if not len(down) == len(up) >= 2 or down[0] != up[1] or not down[0]:
        raise UserError(
            f"{path}: {module}: lora_A {list(down)}, lora_B {list(up)}: expected (rank,"
            " in) and (out, rank)"
        )


def _file(path: epath.Path) -> epath.Path:
    """The LoRA file of a folder, or the path itself if it is a file."""
    if not path.is_dir():
        return path
    known = [path / name for name in (FILE, PEFT_FILE) if (path / name).exists()]
    if len(known) == 2:
        raise UserError(f"{path}: holds {FILE} and {PEFT_FILE}; name one of the two")
    if known:
        return known[0]
    # PEFT saves adapters that have a name in a folder of that name.
    inner = [x for x in files.names(path) if (path / x / PEFT_CONFIG).exists()]
    hint = f"; name {path / inner[0]}" if inner else ""
    return safetensors.only_file(path, f"{FILE}, {PEFT_FILE}", hint)


def _settings_of(
    path: epath.Path, metadata: Mapping[str, str], wrapped: bool, bare: bool
) -> dict[str, Settings]:
    """Settings by component prefix, from the file's metadata or PEFT's file."""
    beside = path.parent / PEFT_CONFIG
    if wrapped and METADATA not in metadata:
        if not beside.exists():
            raise UserError(
                f"{path}: {PEFT_CONFIG} is missing beside it; PEFT stores alpha there"
            )
        config = files.read_object(beside)
        usual = {"r": 8, "lora_alpha": 8}  # LoraConfig's defaults
        return dict.fromkeys(PREFIXES, _settings(str(beside), usual | config))
    where = f"{path}: {METADATA}"
    flat = files.parse_object(where, metadata.get(METADATA, "{}"))
    # diffusers flattens one configuration per component: "transformer.r", ...
    by_prefix: dict[str, dict] = {}
    for key, value in flat.items():
        prefix, dot, name = key.partition(".")
        by_prefix.setdefault(prefix if dot else "", {})[name if dot else key] = value
    configs = {p: by_prefix.get("" if bare else p, {}) for p in PREFIXES}
    return {prefix: _settings(where, config) for prefix, config in configs.items()}


def _settings(where: str, config: Mapping[str, Any]) -> Settings:
    """Settings of a PEFT configuration; UserError if it is not a plain LoRA."""
    # A field that is set and that nothing here reads might change the computation.
    kind, bias = config.get("peft_type", "LORA"), config.get("bias")
    initial = config.get("init_lora_weights")
    for name, value, good in (
        ("peft_type", kind, kind == "LORA"),
        ("bias", bias, bias in (None, "none")),
        ("init_lora_weights", initial, initial in INITIAL),
    ):
        if not good:
            raise UserError(f"{where}: {name} {shown(value)}: expected a plain LoRA")
    read_here = NEUTRAL | {"bias", "init_lora_weights"}
    for name, value in config.items():
        if value and name not in read_here:
            raise UserError(
                f"{where}: {shown(name)} {shown(value)}: expected a plain LoRA, without"
            )
    return Settings(
        where,
        _number(where, "r", config.get("r")),
        _number(where, "lora_alpha", config.get("lora_alpha")),
        _numbers(where, "rank_pattern", config.get("rank_pattern")),
        _numbers(where, "alpha_pattern", config.get("alpha_pattern")),
        _flag(where, "use_rslora", config.get("use_rslora")),
    )


def _flag(where: str, name: str, value: Any) -> bool:
    if value not in (None, True, False):
        raise UserError(f"{where}: {name} {shown(value)}: expected true or false")
    return bool(value)


def _number(where: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float) or not abs(value) <= LARGEST:  # nor NaN
        raise UserError(
            f"{where}: {name} {shown(value)}: expected a number, {LARGEST:g} at most"
        )
    return float(value)


def _numbers(where: str, name: str, value: Any) -> dict[str, float]:
    value = {} if value is None else value
    if not isinstance(value, dict) or None in value.values():
        raise UserError(f"{where}: {name} {shown(value)}: expected numbers by pattern")
    for pattern in value:
        # A repeated group may make a regular expression run for ever.
        if len(pattern) > 500 or re.search(r"\)[*+?{]", pattern):
            raise UserError(
                f"{where}: {name} {shown(pattern)}: a pattern with a repeated group is"
                " not supported; simplify it"
            )
    return {k: _number(where, f"{name} {shown(k)}", v) for k, v in value.items()}


def _take_alphas(path: epath.Path, tensors: Tensors, names: dict) -> dict[str, float]:
    """kohya's alphas by module; their names are removed from `names`."""
    alphas = {}
    # A list first, since names are removed on the way.
    for name in [n for n in names if n.startswith(tuple(KOHYA))]:
        module, dot, last = name.rpartition(".")
        if last == "alpha":
            value = tensors[names.pop(name)].read()
            if value.size != 1 or not math.isfinite(float(value.reshape(-1)[0])):
                raise UserError(f"{path}: {name}: expected one finite number")
            alphas[module] = float(value.reshape(-1)[0])
    return alphas


def _owner(path: epath.Path, tensors: Tensors) -> str:
    """The prefix for a file whose names have none.

    Both CLIPs have the same names: the width decides between them.
    """
    for name in tensors:
        if name.startswith(T5):
            raise UserError(
                f"{path}: {name} is for T5; expected a LoRA of {', '.join(PREFIXES)}"
            )
    clip = {name: x for name, x in tensors.items() if name.startswith(CLIP)}
    if not clip:
        return "transformer"
    # lora_A's inputs are as wide as the tower, but for fc2's, which are the MLP's.
    inputs = [
        x.shape[-1]
        for name, x in clip.items()
        if re.search(r"(?<!fc2)\.(lora_A|lora\S*down)\b", name) and x.shape
    ]
    outputs = [x.shape[0] for name, x in clip.items() if "fc2.lora_B" in name]
    # CLIP-L is 768 wide, CLIP-G 1280.
    return (
        "text_encoder_2" if min(inputs + outputs, default=0) > 1024 else "text_encoder"
    )


def _without_kohya(module: str) -> str:
    start = next((start for start in KOHYA if module.startswith(start)), "")
    return module.removeprefix(start)


def _place(
    path: epath.Path, key: str, owner: str | None
) -> tuple[str, str, str, str | None]:
    """(prefix, module, "A" or "B", adapter) of a tensor's name.

    `owner` is the prefix where names have none. Raises UserError for unknown names.
    """
    for mark, kind in REFUSED.items():
        if mark in key:
            raise UserError(f"{path}: {key}: {kind}; expected only lora_A and lora_B")
    prefix, _, name = key.partition(".")
    if owner is not None:
        start = next((KOHYA[x] for x in KOHYA if key.startswith(x)), None)
        prefix, name = start or owner, key
    if prefix not in PREFIXES:
        guess = near(prefix, PREFIXES)
        hint = f'; did you mean "{guess}"?' if guess else ""
        raise UserError(
            f"{path}: {key} begins with none of {', '.join(PREFIXES)}, the parts that"
            f" can have a LoRA{hint}"
        )
    # Before version 0.20 diffusers kept LoRAs in attention processors.
    name = name.replace(".processor.", ".")
    if old := OLD.fullmatch(name):
        before, which, side = old.groups()
        # The old names are the attention processor's, today's the linear maps'.
        clip = PREFIXES[prefix] != "denoiser"
        last = (
            {"out": "out_proj"}.get(which, f"{which}_proj") if clip else f"to_{which}"
        )
        name = f"{before}{last}{'.0' if last == 'to_out' else ''}.lora.{side}.weight"
    match = SIDE.fullmatch(name)
    if match is None:
        raise UserError(
            f"{path}: {key} is not known; expected MODULE.lora_A.weight and"
            " MODULE.lora_B.weight"
        )
    side = "A" if match[2].endswith(("A", "down")) else "B"
    return prefix, match[1], side, match["adapter"]
