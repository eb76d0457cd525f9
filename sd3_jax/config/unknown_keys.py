"""What to say of a flag or key that does not exist: the one that was meant."""

import difflib
from collections.abc import Iterable

from ml_collections import ConfigDict

from sd3_jax.config import schema
from sd3_jax.config.validation import leaves
from sd3_jax.errors import near, nearest

ALIKE = 1.4  # keys that are suggested for a wrong one; see likeness
FLAGS = ("--config", "--workdir", "--help", "--version")
OTHER_NAMES = {  # of other tools' options, by the last part of a key
    **dict.fromkeys(("guidance", "guidance_scale", "cfg_scale"), "sample.cfg"),
    **dict.fromkeys(("num_inference_steps", "sampling_steps"), "sample.steps"),
    **dict.fromkeys(("negative_prompt", "negative_prompts"), "sample.negative"),
    **dict.fromkeys(("sampler", "sampler_name", "scheduler"), "sample.solver"),
    **dict.fromkeys(("num_images_per_prompt", "num_images"), "sample.per_prompt"),
    "max_sequence_length": "sample.max_length",
    **dict.fromkeys(("epochs", "num_train_epochs", "num_epochs"), "train.steps"),
    **dict.fromkeys(("max_train_steps", "max_steps", "num_steps"), "train.steps"),
    **dict.fromkeys(("validation_prompt", "sample_prompts"), "train.prompts"),
    "report_to": "train.writers",
    "learning_rate": "optim.lr",
    "lr_scheduler": "optim.schedule",
    **dict.fromkeys(("lr_warmup_steps", "warmup_steps"), "optim.warmup"),
    **dict.fromkeys(("max_grad_norm", "grad_clip"), "optim.clip"),
    **dict.fromkeys(("optimizer", "optimizer_type"), "optim.name"),
    "gradient_accumulation_steps": "optim.accumulate",
    **dict.fromkeys(("adam_beta1", "beta1"), "optim.b1"),
    **dict.fromkeys(("adam_beta2", "beta2"), "optim.b2"),
    "ema_decay": "ema.decay",
    "train_batch_size": "data.batch_size",
    **dict.fromkeys(("path", "dataset", "data_dir"), "data.records"),
    **dict.fromkeys(("instance_data_dir", "train_data_dir"), "ingest.inputs"),
    **dict.fromkeys(("mixed_precision", "precision"), "model.dtype"),
    "gradient_checkpointing": "model.remat",
    **dict.fromkeys(("resolution", "size"), "image.height"),
    **dict.fromkeys(("checkpointing_steps", "save_every"), "checkpoint.every"),
    **dict.fromkeys(("lora_rank", "network_dim"), "tune.rank"),
    **dict.fromkeys(("lora_alpha", "network_alpha"), "tune.alpha"),
    **dict.fromkeys(("pretrained_model_name_or_path", "ckpt"), "weights"),
    **dict.fromkeys(("model_path", "checkpoint_path"), "weights"),
}
OTHER_FLAGS = {"output_dir": "--workdir", "outdir": "--workdir", "recipe": "--config"}


def of_flag(name: str) -> str:
    """The end of a message on an unknown flag: the flag that was probably meant."""
    word = name.lstrip("-").replace("-", "_")
    if word in OTHER_FLAGS:
        return f'; did you mean "{OTHER_FLAGS[word]}"?'
    head, _, key = name.partition(".")
    if key:  # --confg.optim.lr, --optim.lr
        key = key if near(head, ["--config"]) else name.lstrip("-")
        return f'; did you mean "--config.{key}"?'
    keys = [OTHER_NAMES[word]] if word in OTHER_NAMES else named(word)
    if not keys:
        return nearest(name, FLAGS)
    return f"; did you mean {listing(f'--config.{key}' for key in keys[:4])}?"


def named(word: str) -> list[str]:
    """The keys whose last part is this word."""
    return [key for key in schema.KEYS if key.rpartition(".")[2] == word]


def listing(names: Iterable[str]) -> str:
    *others, last = [f'"{name}"' for name in names]
    return f"{', '.join(others)} or {last}" if others else last


def of_key(config: ConfigDict, key: str) -> str:
    """No such key: the nearest one, or what there is in its group."""
    group, name = config, "config"
    for part in key.split("."):
        if part not in group or not isinstance(group[part], ConfigDict):
            break
        group, name = group[part], f"{name}.{part}"
    if name == f"config.{key}":
        return f"{name} is a group; expected one of its keys, {', '.join(group)}"
    known, best = dict(leaves(config)), OTHER_NAMES.get(key.rpartition(".")[2])
    if best not in known:
        best = max(known, key=lambda other: likeness(key, other), default=None)
        best = best if best is not None and likeness(key, best) > ALIKE else None
    if best is not None:
        return f'unknown key config.{key}; did you mean "config.{best}"?'
    return f"unknown key config.{key}; {name} has {', '.join(group)}"


def likeness(a: str, b: str) -> float:
    """How alike two keys are, in whole and in their last part: 0 to 3."""
    ratio = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    x, y = a.rpartition(".")[2], b.rpartition(".")[2]
    return ratio(a, b) + (
        2 if is_short_for(x, y) or is_short_for(y, x) else ratio(x, y)
    )


def is_short_for(x: str, y: str) -> bool:
    """batch and bs are short for batch_size."""
    initials = "".join(word[:1] for word in y.split("_"))
    return f"{y}_".startswith(f"{x}_") or x == initials
