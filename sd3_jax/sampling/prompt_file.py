"""Reads a config and its file of prompts into one task for each picture."""

import json
import logging
import re
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax.config.validation import validate
from sd3_jax.data import prompt_text
from sd3_jax.errors import ConfigError, UserError, nearest
from sd3_jax.foreign_text import parse_json, shown

log = logging.getLogger(__name__)
FILE = 2**24  # bytes of a file of prompts, at most
PICTURES = 10**6  # of a job, at most
MOST = {"per_prompt": 10_000, "steps": 1_000}  # of a line
MOST_LOGGED = 20  # lines that make no sense, of which the log tells one by one
# What a line of a .jsonl may say of its picture besides "prompt", and where the config
# has it.
SAMPLE = (
    *("negative", "seed", "per_prompt", "steps", "solver", "grid", "shift"),
    *("cfg", "cfg_start", "cfg_stop", "rescale", "max_length", "clip_skip"),
    *("skip_layers", "skip_scale", "skip_start", "skip_stop"),
    *("guidance_method", "guidance_options", "guidance_schedule"),
)
LINE_SETTINGS = {name: f"sample.{name}" for name in SAMPLE}
LINE_SETTINGS |= {name: f"image.{name}" for name in ("height", "width")}
SHARED = tuple(
    name for name in LINE_SETTINGS if name not in ("negative", "seed", "per_prompt")
)


class Task(NamedTuple):
    """One picture: picture `number` of its prompt, `index` in the job.

    `prompt` is one text, or one for each of the three encoders.
    """

    index: int
    prompt: str | tuple[str, ...]
    number: int
    config: ConfigDict  # its line's own
    settings: dict[str, Any]  # by the names of LINE_SETTINGS

    @property
    def caption(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def group(self) -> tuple:
        """What pictures of one batch have in common."""
        return tuple(str(self.settings[name]) for name in SHARED)


def tasks(config: ConfigDict) -> list[Task]:
    """Tasks of config.sample.prompt, of prompts_file, or of the recipe's prompts."""
    lines = _prompts(config)
    # Counted before the tasks are made: a typo in per_prompt would fill the memory.
    count = sum(line_config.sample.per_prompt for _, line_config in lines)
    if count > PICTURES:
        raise UserError(f"{count} pictures: expected at most {PICTURES}")
    picture_tasks = []
    for prompt, line_config in lines:
        settings = _settings(line_config)
        for number in range(line_config.sample.per_prompt):
            picture_tasks.append(
                Task(len(picture_tasks), prompt, number, line_config, settings)
            )
    return picture_tasks


def task(config: ConfigDict, prompt: str, number: int) -> Task:
    """The task of one picture with the settings of `config`."""
    return Task(0, prompt_text.checked(prompt), number, config, _settings(config))


def prompts(config: ConfigDict, path: str, key: str) -> list[str]:
    """The prompts of a file whose lines have no settings.

    `key` is the config's key of the file. UserError for a line that changes a setting,
    or that has a text for each encoder.
    """
    lines = _lines(config, epath.Path(path), key)
    for prompt, line_config in lines:
        if line_config is not config and line_config.to_dict() != config.to_dict():
            complaint = f'"{shown(prompt, 60)}" has its own settings'
            raise UserError(
                f"config.{key} = {path}: {complaint}; expected only prompts"
            )
        if not isinstance(prompt, str):
            raise UserError(f"config.{key} = {path}: expected one text for each prompt")
    return [prompt for prompt, _ in lines]


def text_lines(path: epath.Path, name: str) -> list[str]:
    """The lines of a file of prompts; errors call it `name`."""
    if not path.is_file():
        reason = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise UserError(f"{name}: {reason}")
    try:
        with path.open("rb") as file:
            # Reading one byte more than allowed tells a file that is too large.
            data = file.read(FILE + 1)
        if len(data) > FILE:
            raise UserError(f"{name}: expected at most {FILE} bytes")
        # str.splitlines would also split at U+2028, which JSON allows inside strings.
        return re.split("\r\n|\n|\r", data.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None


def _prompts(config: ConfigDict) -> list[tuple[Any, ConfigDict]]:
    sample = config.sample
    # Neither has precedence over the other, so both together are an error.
    if sample.prompt and sample.prompts_file:
        raise UserError(
            "config.sample.prompt and config.sample.prompts_file are both set; set only"
            " one of them"
        )
    if sample.prompt:
        return [(prompt_text.checked(sample.prompt, "config.sample.prompt"), config)]
    if sample.prompts_file:
        return _lines(config, epath.Path(sample.prompts_file))
    if not config.train.prompts:
        raise UserError(
            "no prompt; set --config.sample.prompt=TEXT or"
            " --config.sample.prompts_file=FILE, one prompt a line"
        )
    name = "config.train.prompts"
    return [(prompt_text.checked(text, name), config) for text in config.train.prompts]


# --- lines of the file


def _settings(line_config: ConfigDict) -> dict[str, Any]:
    settings = {name: _at(line_config, key) for name, key in LINE_SETTINGS.items()}
    del settings["per_prompt"]
    settings["negative"] = prompt_text.checked(settings["negative"], "negative")
    return settings


def _lines(
    config: ConfigDict, path: epath.Path, key: str = "sample.prompts_file"
) -> list[tuple[Any, ConfigDict]]:
    """The valid lines of a file; invalid ones are logged and skipped."""
    name = f"config.{key} = {path}"
    lines = text_lines(path, name)
    read = _object if path.suffix == ".jsonl" else _text
    parsed, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            # Empty lines are allowed, and keep the numbers in messages those of the
            # file.
            if line.strip():
                parsed.append(read(line.strip(), config))
        except UserError as error:
            bad.append(str(number))
            if len(bad) <= MOST_LOGGED:
                reason = shown(error, 300)
                log.warning("%s:%d: skipped: %s", path, number, reason)
    if not parsed:
        raise UserError(f"{name}: holds no prompt" + (" that can be read" * bool(bad)))
    if bad:
        bad_numbers = ", ".join(bad[:MOST_LOGGED]) + (
            ", …" if bad[MOST_LOGGED:] else ""
        )
        counts = len(bad), len(parsed) + len(bad)
        log.warning("%s: skipped %d of %d lines: %s", path, *counts, bad_numbers)
    return parsed


def _text(line: str, config: ConfigDict) -> tuple[str, ConfigDict]:
    return prompt_text.checked(line), config


def _object(line: str, config: ConfigDict) -> tuple[Any, ConfigDict]:
    """A line {"prompt": …, SETTING: …}; its settings are checked as a config's are."""
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(fields, dict) or "prompt" not in fields:
        raise UserError('expected {"prompt": TEXT, …}')
    prompt = _prompt(fields.pop("prompt"))
    # A copy with references resolved: a line that sets image.height must not move other
    # fields of the recipe that refer to it.
    line_config = config.copy_and_resolve_references()
    for name, value in fields.items():
        if name not in LINE_SETTINGS:
            raise UserError(
                f'unknown "{shown(name)}"{nearest(name, ("prompt", *LINE_SETTINGS))}'
            )
        group, key = LINE_SETTINGS[name].split(".")
        try:
            # ConfigDict checks the type against the recipe's value.
            line_config[group][key] = _plain(value)
        except (TypeError, ValueError, OverflowError):
            wanted = line_config[group].get_type(key).__name__
            complaint = f"{name} {shown(json.dumps(value))}: expected {wanted}"
            raise UserError(complaint) from None
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
    return prompt, line_config


def _prompt(value: Any) -> str | tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise UserError("prompt: expected a text, or one for each encoder")
    if len(texts) not in (1, 3) or not texts[0].strip():
        raise UserError("prompt: expected one text, or three for CLIP-L, CLIP-G and T5")
    texts = tuple(map(prompt_text.checked, texts))
    return texts[0] if len(texts) == 1 else texts


def _plain(value: Any) -> Any:
    """A number, a text or numbers; TypeError for true, null, and nested values."""
    many = value if isinstance(value, list) else [value]
    if any(x is None or isinstance(x, bool | dict | list) for x in many):
        raise TypeError
    return tuple(value) if isinstance(value, list) else value


def _at(config: ConfigDict, key: str) -> Any:
    group, name = key.split(".")
    value = config[group][name]
    return list(value) if isinstance(value, tuple) else value
