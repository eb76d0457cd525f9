"""What to paint: from a config and its file of prompts to one task for each picture."""

import json
import logging
import re
from collections.abc import Iterator
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
TOLD = 20  # lines that make no sense, of which the log tells one by one
# What a line of a .jsonl may say of its picture besides "prompt", and where the config
# has it.
SAMPLE = (
    *("negative", "seed", "per_prompt", "steps", "solver", "grid", "shift"),
    *("cfg", "cfg_start", "cfg_stop", "rescale", "max_length", "clip_skip"),
    *("skip_layers", "skip_scale", "skip_start", "skip_stop"),
)
OWN = {name: f"sample.{name}" for name in SAMPLE}
OWN |= {name: f"image.{name}" for name in ("height", "width")}
SHARED = tuple(name for name in OWN if name not in ("negative", "seed", "per_prompt"))


class Task(NamedTuple):
    """One picture: picture `number` of its prompt, `index` in the job.

    `prompt` is one text, or one for each of the three encoders.
    """

    index: int
    prompt: str | tuple[str, ...]
    number: int
    config: ConfigDict  # its line's own
    settings: dict[str, Any]  # by the names of OWN

    @property
    def caption(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def group(self) -> tuple:
        """What pictures of one batch have in common."""
        return tuple(str(self.settings[name]) for name in SHARED)


def tasks(config: ConfigDict) -> list[Task]:
    """Of config.sample.prompt, or prompts_file, or the recipe's own prompts."""
    found = list(_prompts(config))
    count = sum(own.sample.per_prompt for _, own in found)
    if count > PICTURES:
        raise UserError(f"{count} pictures: wanted at most {PICTURES}")
    made = []
    for prompt, own in found:
        settings = _settings(own)
        for number in range(own.sample.per_prompt):
            made.append(Task(len(made), prompt, number, own, settings))
    return made


def task(config: ConfigDict, prompt: str, number: int) -> Task:
    """One picture of a prompt as the config has it, outside any job's order."""
    return Task(0, prompt_text.checked(prompt), number, config, _settings(config))


def prompts(config: ConfigDict, path: str, key: str) -> list[str]:
    """The prompts of a file that all are painted as the config says.

    `key` is the config's that names the file; a line with settings of its own, or with
    texts for each encoder, is a UserError.
    """
    found = _lines(config, epath.Path(path), key)
    for prompt, own in found:
        if own is not config and own.to_dict() != config.to_dict():
            told = f'"{shown(prompt, 60)}" has settings of its own'
            raise UserError(f"config.{key} = {path}: {told}; wanted prompts alone")
        if not isinstance(prompt, str):
            raise UserError(f"config.{key} = {path}: wanted one text a prompt")
    return [prompt for prompt, _ in found]


def text_lines(path: epath.Path, name: str) -> list[str]:
    """The lines of a file of prompts, which messages call `name`; or a UserError."""
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    try:
        with path.open("rb") as file:
            data = file.read(FILE + 1)
        if len(data) > FILE:
            raise UserError(f"{name}: wanted at most {FILE} bytes")
        return re.split("\r\n|\n|\r", data.decode("utf-8-sig"))  # not at U+2028
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None


def _prompts(config: ConfigDict) -> Iterator[tuple[Any, ConfigDict]]:
    sample = config.sample
    if sample.prompt and sample.prompts_file:
        raise UserError(
            "config.sample.prompt and config.sample.prompts_file are both given; wanted"
            " one of them"
        )
    if sample.prompt:
        return [(prompt_text.checked(sample.prompt, "config.sample.prompt"), config)]
    if sample.prompts_file:
        return _lines(config, epath.Path(sample.prompts_file))
    if not config.train.prompts:
        raise UserError(
            "no prompt: wanted --config.sample.prompt=TEXT or"
            " --config.sample.prompts_file=FILE, one prompt a line"
        )
    name = "config.train.prompts"
    return [(prompt_text.checked(text, name), config) for text in config.train.prompts]


def _settings(own: ConfigDict) -> dict[str, Any]:
    settings = {name: _at(own, key) for name, key in OWN.items()}
    del settings["per_prompt"]
    settings["negative"] = prompt_text.checked(settings["negative"], "negative")
    return settings


def _lines(
    config: ConfigDict, path: epath.Path, key: str = "sample.prompts_file"
) -> list[tuple[Any, ConfigDict]]:
    """A line that makes no sense is told of, and does not stop the others."""
    name = f"config.{key} = {path}"
    lines = text_lines(path, name)
    read = _object if path.suffix == ".jsonl" else _text
    found, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(read(line.strip(), config))
        except UserError as error:
            bad.append(str(number))
            if len(bad) <= TOLD:
                reason = shown(error, 300)
                log.warning("%s:%d: %s: not painted", path, number, reason)
    if not found:
        raise UserError(f"{name}: holds no prompt" + (" that can be read" * bool(bad)))
    if bad:
        told = ", ".join(bad[:TOLD]) + (", …" if bad[TOLD:] else "")
        counts = len(bad), len(found) + len(bad)
        log.warning("%s: %d of %d lines are not painted: %s", path, *counts, told)
    return found


def _text(line: str, config: ConfigDict) -> tuple[str, ConfigDict]:
    return prompt_text.checked(line), config


def _object(line: str, config: ConfigDict) -> tuple[Any, ConfigDict]:
    """{"prompt": …} with settings of its own, checked as the config itself is."""
    try:
        given = parse_json(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(given, dict) or "prompt" not in given:
        raise UserError('wanted {"prompt": TEXT, …}')
    prompt = _prompt(given.pop("prompt"))
    own = config.copy_and_resolve_references()
    for name, value in given.items():
        if name not in OWN:
            raise UserError(f'unknown "{shown(name)}"{nearest(name, ("prompt", *OWN))}')
        group, key = OWN[name].split(".")
        try:
            own[group][key] = _plain(value)
        except (TypeError, ValueError, OverflowError):
            wanted = own[group].get_type(key).__name__
            told = f"{name} {shown(json.dumps(value))}: wanted {wanted}"
            raise UserError(told) from None
    try:
        validate(own)
    except ConfigError as error:
        raise UserError(str(error)) from None
    for name, most in MOST.items():
        if own.sample[name] > most:
            raise UserError(f"{name} {own.sample[name]}: wanted at most {most}")
    last = own.sample.seed + own.sample.per_prompt - 1
    if last >= 2**32:
        raise UserError(f"seed {last}, of the last picture: wanted below {2**32}")
    own.sample.negative = prompt_text.checked(own.sample.negative, "negative")
    return prompt, own


def _prompt(given: Any) -> str | tuple[str, ...]:
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise UserError("prompt: wanted a text, or one for each encoder")
    if len(found) not in (1, 3) or not found[0].strip():
        raise UserError("prompt: wanted a text, or three, for CLIP-L, CLIP-G and T5")
    found = tuple(map(prompt_text.checked, found))
    return found[0] if len(found) == 1 else found


def _plain(value: Any) -> Any:
    """A number, a text or numbers; true would pass for 1, null for any type."""
    many = value if isinstance(value, list) else [value]
    if any(x is None or isinstance(x, bool | dict | list) for x in many):
        raise TypeError
    return tuple(value) if isinstance(value, list) else value


def _at(config: ConfigDict, key: str) -> Any:
    group, name = key.split(".")
    value = config[group][name]
    return list(value) if isinstance(value, tuple) else value
