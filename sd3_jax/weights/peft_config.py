"""PEFT's configuration of an adapter: ranks and alphas by layer.

PEFT has it in adapter_config.json beside the file, diffusers in the file's metadata,
flattened, with the component's folder before each field.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.weights.components import COMPONENTS

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of a file of diffusers: the configuration, as JSON
FOLDERS = {
    COMPONENTS[name].folder: name for name in ("denoiser", "clip_l", "clip_g", "t5")
}
KINDS = ("LORA", "LOKR", "LOHA")
LARGEST = 1e6  # rank or alpha, at most
# Options that change nothing once the tensors are there, or that Settings reads.
NEUTRAL = set(
    "peft_type task_type auto_mapping base_model_name_or_path revision peft_version"
    " inference_mode r lora_alpha alpha rank_pattern alpha_pattern use_rslora use_dora"
    " lora_bias bias modules_to_save target_modules exclude_modules layers_to_transform"
    " layers_pattern lora_dropout rank_dropout module_dropout rank_dropout_scale"
    " init_weights decompose_both decompose_factor use_effective_conv2d eva_config"
    " megatron_core qalora_group_size runtime_config ensure_weight_tying".split()
)
# Values of init_lora_weights that leave the base as it is. Others (PiSSA, OLoRA, ...)
# change the base's weights when training begins: A and B are not the whole update.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal")

# Parts of a pattern by which it may match in several ways, escaped or not.
REPETITION = re.compile(r"[*+{]")
CHOICE = re.compile(r"[*+{(]|(?<!\()\?")
REPEATED_GROUP = re.compile(r"\)[*+?{]")
MOST_REPETITIONS, MOST_CHOICES = 3, 5


class Settings(NamedTuple):
    """The ranks and alphas of a configuration.

    Patterns are regular expressions for the end of a module's name; as in PEFT, the
    first that matches counts.
    """

    where: str
    rank: float | None = None
    alpha: float | None = None
    ranks: Mapping[str, float] = {}
    alphas: Mapping[str, float] = {}
    rslora: bool = False
    dora: bool = False
    whole: bool = False  # whether weights or biases are saved whole

    def scale(self, module: str, rank: int | None) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha defaults to the rank.

        `rank` is None for a LoKr of two whole matrices, which has the configured rank.
        Raises UserError if the configuration's rank is not the tensors'.
        """
        # A rank that disagrees means that the configuration is of another file.
        configured = self._of(self.ranks, module, self.rank)
        if rank is not None and configured not in (None, rank):
            raise UserError(
                f"{self.where}: {module} has rank {configured:g}, but its tensors have"
                f" {rank}"
            )
        rank = configured if rank is None else rank
        if not rank:
            return 1.0
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


def of_folder(path: epath.Path) -> dict[str, Settings]:
    """Settings from the configuration beside PEFT's file, for whichever component."""
    config = files.read_object(path)
    usual = {"r": 8, "lora_alpha": 8, "alpha": 8}  # PEFT's defaults
    return dict.fromkeys(FOLDERS.values(), settings(str(path), usual | config))


def of_metadata(path: epath.Path, metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Settings by component from a file's metadata, with defaults without any."""
    where = f"{path}: {METADATA}"
    flat = files.parse_object(where, metadata.get(METADATA, "{}"))
    # diffusers flattens one configuration per component: "transformer.r", ... A model's
    # own adapter, without a component in its names, has plain fields.
    configs: dict[str, dict] = {name: {} for name in FOLDERS.values()}
    for key, value in flat.items():
        prefix, dot, field = key.partition(".")
        if dot and prefix in FOLDERS:
            configs[FOLDERS[prefix]][field] = value
        elif not dot:
            for config in configs.values():
                config.setdefault(key, value)
    return {name: settings(where, config) for name, config in configs.items()}


def settings(where: str, config: Mapping[str, Any]) -> Settings:
    """Settings of a configuration; UserError for an option that is not implemented."""
    # A field that is set and that nothing here reads might change the computation.
    kind, bias = config.get("peft_type", "LORA"), config.get("bias")
    initial = config.get("init_lora_weights")
    for name, value, allowed in (
        ("peft_type", kind, KINDS),
        ("bias", bias, (None, "none", "all", "lora_only")),
        ("init_lora_weights", initial, INITIAL),
    ):
        if value not in allowed:
            names = ", ".join(str(x) for x in allowed if x is not None)
            raise UserError(
                f"{where}: {name} {shown(value)} is not supported; expected {names}"
            )
    for name, value in config.items():
        if value and name not in NEUTRAL | {"init_lora_weights"}:
            raise UserError(
                f"{where}: {shown(name)} {shown(value)} is not supported; expected an"
                " adapter without it"
            )
    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    return Settings(
        where,
        _number(where, "r", config.get("r")),
        _number(where, alpha, config.get(alpha)),
        _numbers(where, "rank_pattern", config.get("rank_pattern")),
        _numbers(where, "alpha_pattern", config.get("alpha_pattern")),
        _flag(where, "use_rslora", config.get("use_rslora")),
        _flag(where, "use_dora", config.get("use_dora")),
        bool(config.get("modules_to_save")) or bias in ("all", "lora_only"),
    )


def of_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The configuration of a LoRA of these ranks by module; every alpha is the rank."""
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
        # Each choice multiplies the ways to match: a few take a module's name in
        # microseconds, fifteen run for ever. A repeated group does so alone.
        if (
            len(pattern) > 500
            or REPEATED_GROUP.search(pattern)
            or len(REPETITION.findall(pattern)) > MOST_REPETITIONS
            or len(CHOICE.findall(pattern)) > MOST_CHOICES
        ):
            raise UserError(
                f"{where}: {name} {shown(pattern)}: a pattern with a repeated group,"
                f" more than {MOST_REPETITIONS} repetitions or more than {MOST_CHOICES}"
                " groups and repetitions is not supported; simplify it"
            )
    return {k: _number(where, f"{name} {shown(k)}", v) for k, v in value.items()}
