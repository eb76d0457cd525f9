"""One line of a file of prompts: a text, or an object with settings of its own."""

import json
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax.config import released_keys
from sd3_jax.config.validation import validate
from sd3_jax.data import prompt_text, prompt_weights
from sd3_jax.errors import ConfigError, UserError, nearest
from sd3_jax.foreign_text import parse_json, shown
from sd3_jax.sampling.job import line_inputs
from sd3_jax.sampling.job.line_inputs import Looked

MOST = {"per_prompt": 10_000, "steps": 1_000}  # of a line
# What a line of a .jsonl may say of its picture besides "prompt", and where the config
# has it.
SAMPLE = (
    *("negative", "seed", "per_prompt", "steps", "solver", "grid", "shift"),
    *("cfg", "cfg_start", "cfg_stop", "rescale", "max_length", "clip_skip"),
    "prompt_weighting",
    *("skip_layers", "skip_scale", "skip_start", "skip_stop"),
    *("guidance_method", "guidance_options", "guidance_schedule"),
    *("cache", "cache_options", "cache_calibration"),
)
LINE_SETTINGS = {name: f"sample.{name}" for name in SAMPLE}
LINE_SETTINGS |= {name: f"image.{name}" for name in ("height", "width")}
SHARED = tuple(
    name for name in LINE_SETTINGS if name not in ("negative", "seed", "per_prompt")
)
# Settings of pictures to change. A task has those that act.
MASKED = ("paste", "mask_blur", "mask_padding", "crop_to_mask", "outpaint")
CHANGED = tuple(name for name in released_keys.EDITED if name != "images")
LINE_SETTINGS |= {name: f"sample.{name}" for name in CHANGED}
NESTED = ("control", "lora")  # values of a line that are no config's
ALIASES = {"guidance": "cfg"}
# What a run's own checkpoint does not read: it paints from text alone.
RELEASED = (*released_keys.RELEASED, *NESTED, "prompt_weighting")


class Line(NamedTuple):
    """A prompt with its settings: those of `config`, and `nested` by NESTED's names."""

    prompt: str | tuple[str, ...]
    config: ConfigDict
    where: str = ""  # the file and the number, for messages
    nested: dict[str, Any] = {}
    sized: bool = False  # it sets height or width itself
    first: int = 0  # number of its first picture
    slot: tuple[int, int] | None = None


def settings_of(line_config: ConfigDict) -> dict[str, Any]:
    settings = {name: _at(line_config, key) for name, key in LINE_SETTINGS.items()}
    del settings["per_prompt"]
    settings["negative"] = prompt_text.checked(settings["negative"], "negative")
    # What does not act is left out, so that it does not tell pictures apart.
    acts = dict.fromkeys(LINE_SETTINGS, True)
    image, mask = bool(settings["image"]), bool(settings["mask"])
    acts |= dict.fromkeys(("image", "strength"), image)
    acts |= dict.fromkeys(MASKED, mask or bool(settings["outpaint"]))
    acts |= {"mask": mask, "resize": bool(settings["resize"])}
    acts["outpaint"] = bool(settings["outpaint"])
    acts["crop_to_mask"] = settings["crop_to_mask"] >= 0
    caches = ("cache", "cache_options", "cache_calibration")
    acts |= {name: bool(settings["cache"] and settings[name]) for name in caches}
    return {name: value for name, value in settings.items() if acts[name]}


def read_text(line: str, config: ConfigDict, path: epath.Path, looked: Looked) -> Line:
    return with_pictures(Line(prompt_text.checked(line), config), looked)


def read_object(
    line: str, config: ConfigDict, path: epath.Path, looked: Looked
) -> Line:
    """A line {"prompt": …, SETTING: …}; its settings are checked as a config's are."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise UserError('expected {"prompt": TEXT, …}')
    return read_fields(fields, config, path.parent, looked)


def read_fields(
    fields: dict[str, Any], config: ConfigDict, folder: epath.PathLike, looked: Looked
) -> Line:
    """A line of its fields; their paths are relative to `folder`."""
    prompt = _prompt(fields.pop("prompt"))
    fields = _without_aliases(fields)
    # A copy with references resolved: a line that sets image.height must not move other
    # fields of the recipe that refer to it.
    line_config = config.copy_and_resolve_references()
    nested = {}
    for name, value in fields.items():
        if name not in LINE_SETTINGS and name not in NESTED:
            names = ("prompt", *LINE_SETTINGS, *NESTED)
            raise UserError(f'unknown "{shown(name)}"{nearest(name, names)}')
        if name in RELEASED and not config.weights:
            raise UserError(
                f'"{name}" needs released weights in config.weights; a checkpoint of a'
                " run does not read it"
            )
        if name == "control":
            nested[name] = line_inputs.read_controls(value, folder)
        elif name == "lora":
            nested[name] = line_inputs.read_loras(value, folder)
        elif name.endswith("_options") and isinstance(value, dict):
            _assign(line_config, name, _spelled(name, value))
        else:
            _assign(line_config, name, value)
    try:
        validate(line_config)
    except ConfigError as error:
        raise UserError(str(error)) from None
    # A line may come from a user of a service: it must not cost a day of compute.
    for name, most in MOST.items():
        if line_config.sample[name] > most:
            raise UserError(
                f"{name} {line_config.sample[name]}: expected at most {most}"
            )
    # Released weights are seeded with seed + number, which must fit in 32 bits.
    last = line_config.sample.seed + line_config.sample.per_prompt - 1
    if last >= 2**32:
        raise UserError(f"seed {last}, of the last picture: expected below {2**32}")
    line_config.sample.negative = prompt_text.checked(
        line_config.sample.negative, "negative"
    )
    for name in ("image", "mask", "cache_calibration"):
        if name in fields:
            value = line_config.sample[name]
            line_config.sample[name] = line_inputs.locate(value, folder)
    if fields.get("cache_calibration"):
        # Read to be checked alone: a damaged file is this line's error.
        looked.curve(line_config.sample.cache_calibration)
    sized = bool(fields.keys() & {"height", "width"})
    line = Line(prompt, line_config, nested=nested, sized=sized)
    return with_pictures(line, looked)


def with_pictures(line: Line, looked: Looked) -> Line:
    """The line with the size that its pictures have; UserError if they do not fit, or
    for weights of its prompt that do not parse."""
    sample = line.config.sample
    if syntax := sample.prompt_weighting:
        texts = [line.prompt] if isinstance(line.prompt, str) else line.prompt
        # Parsed to be checked alone: what does not parse is this line's error, and not
        # one of its batch.
        for text in *texts, sample.negative:
            prompt_weights.parse(text, syntax)
    acting = ("image", "mask", "outpaint")
    if not line.nested and not any(sample[name] for name in acting):
        return line
    if not line.config.weights:
        name = next(name for name in acting if sample[name])
        raise UserError(f"config.sample.{name} needs released weights, config.weights")
    settings = settings_of(line.config) | line.nested
    for name in ("image", "mask"):
        if name in settings:
            settings[name] = line_inputs.locate(settings[name], ".")
    placed = line_inputs.place(settings, looked, sized=line.sized)
    line_config = line.config.copy_and_resolve_references()
    line_config.sample.update({k: settings.get(k, "") for k in ("image", "mask")})
    line_config.image.update(dict(zip(("height", "width"), placed.generated)))
    try:
        validate(line_config)
    except ConfigError as error:
        hint = "" if sample.resize else "; or set resize to crop or stretch"
        about = settings.get("image") or line.nested["control"][0]["image"]
        raise UserError(f"{about}: {error}{hint}") from None
    # From here on the size is the line's own, so that it is not asked for again.
    return line._replace(config=line_config)


def _without_aliases(fields: dict[str, Any]) -> dict[str, Any]:
    for alias, name in ALIASES.items():
        if alias in fields and name in fields:
            raise UserError(f'"{alias}" and "{name}" are one setting; set only one')
    return {ALIASES.get(name, name): value for name, value in fields.items()}


def _assign(line_config: ConfigDict, name: str, value: Any) -> None:
    group, key = LINE_SETTINGS[name].split(".")
    try:
        # ConfigDict checks the type against the recipe's value.
        line_config[group][key] = _plain(value, line_config[group].get_type(key))
    except (TypeError, ValueError, OverflowError):
        wanted = line_config[group].get_type(key).__name__
        complaint = f"{name} {shown(json.dumps(value))}: expected {wanted}"
        raise UserError(complaint) from None


def _spelled(key: str, options: dict[str, Any]) -> str:
    """Options as a config spells them: {"eta": 0, "layers": [7, 8]} is
    "eta=0, layers=7 8"."""
    parts = []
    for name, value in options.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(type(x) in (int, float) for x in numbers):
            raise UserError(
                f"{key} {shown(json.dumps({name: value}))}: expected a"
                " number, or a list of layers"
            )
        parts.append(f"{name}={' '.join(map(str, numbers))}")
    return ", ".join(parts)


def _prompt(value: Any) -> str | tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise UserError("prompt: expected a text, or one for each encoder")
    if len(texts) not in (1, 3) or not texts[0].strip():
        raise UserError("prompt: expected one text, or three for CLIP-L, CLIP-G and T5")
    texts = tuple(map(prompt_text.checked, texts))
    return texts[0] if len(texts) == 1 else texts


def _plain(value: Any, kind: type) -> Any:
    """A number, a text or numbers; TypeError for null, and for true of other kinds."""
    many = value if isinstance(value, list) else [value]
    if any(x is None or isinstance(x, bool | dict | list) for x in many):
        if kind is bool and isinstance(value, bool):
            return value
        raise TypeError
    return tuple(value) if isinstance(value, list) else value


def _at(config: ConfigDict, key: str) -> Any:
    group, name = key.split(".")
    value = config[group][name]
    return list(value) if isinstance(value, tuple) else value
