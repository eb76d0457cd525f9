"""Reads a config and its file of prompts into one task for each picture."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.data import prompt_sheet, prompt_text
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.job import line_inputs, repeated_pictures
from sd3_jax.sampling.job.line_inputs import Looked
from sd3_jax.sampling.job.prompt_lines import (
    CHANGED,
    NESTED,
    SHARED,
    Line,
    read_object,
    read_text,
    settings_of,
    with_pictures,
)

log = logging.getLogger(__name__)
FILE = 2**24  # bytes of a file of prompts, at most
PICTURES = 10**6  # of a job, at most
MOST_LOGGED = 20  # lines that make no sense, of which the log tells one by one
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # of pictures in a folder
CAPTIONS = (".txt", ".caption")


class Task(NamedTuple):
    """One picture: picture `number` of its prompt, `index` in the job.

    `prompt` is one text, or one for each of the three encoders. `inputs` are
    fingerprints of the files that `settings` name. `slot`, its row in a batch and the
    batch's size, is that of a picture to repeat.
    """

    index: int
    prompt: str | tuple[str, ...]
    number: int
    config: ConfigDict  # its line's own
    settings: dict[str, Any]  # by the names of LINE_SETTINGS and NESTED
    where: str = ""
    size: tuple[int, int] = (0, 0)  # height and width of the result
    inputs: dict[str, str] = {}
    slot: tuple[int, int] | None = None

    @property
    def caption(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    @property
    def group(self) -> tuple:
        """What pictures of one batch have in common: all but prompt, seed and files.

        The sampler of a run's checkpoint has one seed and one negative prompt.
        """
        s = self.settings
        alone = () if self.config.weights else ("seed", "negative")
        shared = tuple(str(s.get(name)) for name in (*SHARED, *alone))
        if not s.keys() & {*CHANGED, *NESTED}:
            return shared
        # Rows may have other pictures and masks; that they have one is a shape.
        names = [name for name in CHANGED if name not in ("image", "mask")]
        changed = [str(s.get(name)) for name in names]
        pixels = lambda fields: ("image" in fields, "mask" in fields)
        nets = [
            (pixels(x), *(str(x.get(k)) for k in ("net", "preprocess", *NUMBERS)))
            for x in s.get("control", ())
        ]
        # With the weights: a bundle holds the LoRAs of one group at a time, in its
        # order.
        lora = str(s.get("lora"))
        # The size last: crops are painted at one size and pasted into pictures of
        # others, whose rows cannot be stacked.
        return (*shared, *changed, pixels(s), tuple(nets), lora, self.size)


NUMBERS = tuple(line_inputs.CONTROL)


def tasks(config: ConfigDict) -> list[Task]:
    """Tasks of the config's prompts: one prompt, a file, a folder of pictures, a
    picture to repeat, or the recipe's prompts."""
    looked = Looked()
    lines = _prompts(config, looked)
    # Counted before the tasks are made: a typo in per_prompt would fill the memory.
    count = sum(line.config.sample.per_prompt for line in lines)
    if count > PICTURES:
        raise UserError(f"{count} pictures: expected at most {PICTURES}")
    if any("lora" in line.nested for line in lines):
        # LoRAs that differ from line to line are all loaded in one way.
        usual = line_inputs.read_loras(list(config.sample.lora), ".")
        lines = [x._replace(nested={"lora": usual} | x.nested) for x in lines]
    return tasks_of(lines, looked)


def tasks_of(lines: Iterable[Line], looked: Looked) -> list[Task]:
    """A task for each picture of the lines; UserError if their pictures do not fit."""
    picture_tasks = []
    for line in lines:
        settings = settings_of(line.config) | line.nested
        named = {*CHANGED, *NESTED, "cache_calibration"}
        with_inputs = bool(settings.keys() & named)
        placed = line_inputs.place(settings, looked, sized=line.sized)
        inputs = placed.inputs if with_inputs else {}
        for number in range(line.first, line.first + line.config.sample.per_prompt):
            index = len(picture_tasks)
            about = line.where, placed.result, inputs, line.slot
            head = index, line.prompt, number, line.config, settings
            picture_tasks.append(Task(*head, *about))
    return picture_tasks


def task(config: ConfigDict, prompt: str, number: int) -> Task:
    """The task of one picture with the settings of `config`."""
    settings = settings_of(config)
    if changes := [name for name in ("image", "mask", "outpaint") if name in settings]:
        raise UserError(f"config.sample.{changes[0]}: only the job sample uses it")
    return Task(0, prompt_text.checked(prompt), number, config, settings)


def prompts(config: ConfigDict, path: str, key: str) -> list[str]:
    """The prompts of a file whose lines have no settings.

    `key` is the config's key of the file. UserError for a line that changes a setting,
    or that has a text for each encoder.
    """
    lines = _lines(config, epath.Path(path), Looked(), key)
    for line in lines:
        prompt, line_config = line.prompt, line.config
        if line.nested or (
            line_config is not config and line_config.to_dict() != config.to_dict()
        ):
            complaint = f'"{shown(prompt, 60)}" has its own settings'
            raise UserError(
                f"config.{key} = {path}: {complaint}; expected only prompts"
            )
        if not isinstance(prompt, str):
            raise UserError(f"config.{key} = {path}: expected one text for each prompt")
    return [line.prompt for line in lines]


def text_lines(path: epath.Path, name: str) -> list[str]:
    """The lines of a file of prompts; errors call it `name`."""
    if not path.is_file():
        # A pipe would wait for a writer.
        odd = "not a regular file" if files.exists(path) else "no such file"
        reason = "is a folder, expected a file" if path.is_dir() else odd
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


def _prompts(config: ConfigDict, looked: Looked) -> list[Line]:
    sample = config.sample
    sources = [x for x in ("from", "prompts_file", "images") if sample[x]]
    # None has precedence over another, so two together are an error. A folder of
    # pictures may have one prompt for all.
    if sample.prompt and sources not in ([], ["images"]):
        sources = ["prompt", *sources]
    if sample.images and sample.image:
        sources.append("image")
    if len(sources) > 1:
        names = [f"config.sample.{name}" for name in sources]
        raise UserError(f"{' and '.join(names)} are both set; set only one of them")
    if sample["from"]:
        return [repeated_pictures.read_repeated(config, sample["from"], looked)]
    if sample.prompts_file:
        return _lines(config, epath.Path(sample.prompts_file), looked)
    if sample.images:
        return _folder(config, epath.Path(sample.images), looked)
    texts, name = [sample.prompt], "config.sample.prompt"
    if not sample.prompt:
        texts, name = config.train.prompts, "config.train.prompts"
    if not texts:
        raise UserError(
            "no prompt; set --config.sample.prompt=TEXT or"
            " --config.sample.prompts_file=FILE, one prompt a line"
        )
    lines = [Line(prompt_text.checked(text, name), config) for text in texts]
    return [with_pictures(line, looked) for line in lines]


# --- a folder of pictures, and a picture to repeat


def _folder(config: ConfigDict, folder: epath.Path, looked: Looked) -> list[Line]:
    """A line for each picture, with its caption's file or the one prompt for all."""
    # One listing: in a bucket each look for a caption would be a request.
    names = set(files.names(folder))
    pictures = sorted(x for x in names if x.lower().endswith(SUFFIXES))
    title = f"config.sample.images = {folder}"
    if not pictures:
        raise UserError(f"{title}: holds no picture; expected {', '.join(SUFFIXES)}")

    def line(name: str) -> Line:
        prompt, stem = config.sample.prompt, name.rpartition(".")[0]
        if not prompt:
            texts = [f"{x}{end}" for x in (stem, name) for end in CAPTIONS]
            caption = next((x for x in texts if x in names), None)
            if caption is None:
                raise UserError(
                    f"{stem}.txt: no such file; write the prompt to it, or set"
                    " config.sample.prompt for all"
                )
            text = "\n".join(text_lines(folder / caption, caption))
            prompt = text.strip()
        line_config = config.copy_and_resolve_references()
        line_config.sample.image = files.absolute(folder / name)
        where = f"{folder / name}"
        checked = Line(prompt_text.checked(prompt), line_config, where)
        return with_pictures(checked, looked)

    # name=name binds each: a generator's variable moves on before its line is read.
    entries = ((f"{folder / name}", lambda name=name: line(name)) for name in pictures)
    return _valid(entries, title, "pictures")


def _lines(
    config: ConfigDict,
    path: epath.Path,
    looked: Looked,
    key: str = "sample.prompts_file",
) -> list[Line]:
    """The valid lines of a file; invalid ones are logged and skipped."""
    name = f"config.{key} = {path}"
    read = read_object if path.suffix == ".jsonl" else read_text
    numbered = enumerate(text_lines(path, name), 1)
    if path.suffix == ".tsv":  # PartiPrompts', with categories that `vote` reads
        numbered = prompt_sheet.table_prompts(text_lines(path, name), name)
    # Empty lines are allowed, and keep the numbers in messages those of the file.
    entries = (
        (f"{path}:{number}", lambda line=line: read(line.strip(), config, path, looked))
        for number, line in numbered
        if line.strip()
    )
    return _valid(entries, name, "lines")


def _valid(
    entries: Iterable[tuple[str, Callable[[], Line]]], title: str, kind: str
) -> list[Line]:
    """The lines that can be read, of (where, read); the others are logged."""
    parsed, bad = [], []
    for where, read in entries:
        try:
            parsed.append(read()._replace(where=where))
        except UserError as error:
            bad.append(re.split("[:/]", where)[-1])
            if len(bad) <= MOST_LOGGED:
                log.warning("%s: skipped: %s", where, shown(error, 300))
    if not parsed:
        raise UserError(f"{title}: holds no prompt" + (" that can be read" * bool(bad)))
    if bad:
        names = ", ".join(bad[:MOST_LOGGED]) + (", …" if bad[MOST_LOGGED:] else "")
        path = title.partition(" = ")[2]
        counts = len(bad), len(parsed) + len(bad)
        log.warning("%s: skipped %d of %d %s: %s", path, *counts, kind, names)
    return parsed
