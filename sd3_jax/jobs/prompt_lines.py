"""What to paint: from a config and its file of prompts to one task for each picture."""

import json
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax.errors import ConfigError, UserError, nearest
from sd3_jax.validate import validate

log = logging.getLogger(__name__)
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
    made = []
    for prompt, own in _prompts(config):
        settings = {name: _at(own, key) for name, key in OWN.items()}
        for number in range(settings.pop("per_prompt")):
            made.append(Task(len(made), prompt, number, own, settings))
    return made


def _prompts(config: ConfigDict) -> Iterator[tuple[Any, ConfigDict]]:
    sample = config.sample
    if sample.prompt and sample.prompts_file:
        raise UserError(
            "config.sample.prompt and config.sample.prompts_file are both given; wanted"
            " one of them"
        )
    if sample.prompt:
        return [(sample.prompt, config)]
    if sample.prompts_file:
        return _lines(config, epath.Path(sample.prompts_file))
    if not config.train.prompts:
        raise UserError(
            "no prompt: wanted --config.sample.prompt=TEXT or"
            " --config.sample.prompts_file=FILE, one prompt a line"
        )
    return [(prompt, config) for prompt in config.train.prompts]


def _lines(config: ConfigDict, path: epath.Path) -> list[tuple[Any, ConfigDict]]:
    """A line that makes no sense is told of, and does not stop the others."""
    name = f"config.sample.prompts_file = {path}"
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 at byte {error.start}") from None
    found, bad = [], []
    read = _object if path.suffix == ".jsonl" else lambda line, config: (line, config)
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(read(line.strip(), config))
        except UserError as error:
            log.warning("%s:%d: %s: not painted", path, number, error)
            bad.append(str(number))
    if not found:
        raise UserError(f"{name}: holds no prompt" + (" that can be read" * bool(bad)))
    if bad:
        log.warning("%s: of %d lines not painted: %s", path, len(lines), ", ".join(bad))
    return found


def _object(line: str, config: ConfigDict) -> tuple[Any, ConfigDict]:
    """{"prompt": …} with settings of its own, checked as the config itself is."""
    try:
        given = json.loads(line)
    except ValueError as error:
        raise UserError(f"not JSON: {error}") from None
    if not isinstance(given, dict) or "prompt" not in given:
        raise UserError('wanted {"prompt": TEXT, …}')
    prompt = given.pop("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
        raise UserError("prompt: wanted a text, or one for each encoder")
    if len(texts) not in (1, 3) or not texts[0].strip():
        raise UserError("prompt: wanted a text, or three, for CLIP-L, CLIP-G and T5")
    own = config.copy_and_resolve_references()
    for name, value in given.items():
        if name not in OWN:
            raise UserError(f'unknown "{name}"{nearest(name, ("prompt", *OWN))}')
        group, key = OWN[name].split(".")
        try:
            if isinstance(value, bool):  # Python would take it for a number
                raise TypeError
            own[group][key] = tuple(value) if isinstance(value, list) else value
        except (TypeError, ValueError):
            wanted = own[group].get_type(key).__name__
            raise UserError(f"{name} {json.dumps(value)}: wanted {wanted}") from None
    try:
        validate(own)
    except ConfigError as error:
        raise UserError(str(error)) from None
    return (texts[0] if len(texts) == 1 else tuple(texts)), own


def _at(config: ConfigDict, key: str) -> Any:
    group, name = key.split(".")
    value = config[group][name]
    return list(value) if isinstance(value, tuple) else value
