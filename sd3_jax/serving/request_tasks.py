"""From the fields of a request to tasks of the job `sample`, one for each picture."""

import re
import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.job import line_arrays, prompt_file, prompt_lines
from sd3_jax.sampling.job.line_inputs import Looked
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.serving.api_errors import ApiError, invalid, of_mistake
from sd3_jax.serving.limits import Limits, size_text
from sd3_jax.serving.request_fields import EDITS, NAMES

# At most five digits, so that int() never gets a text of a million.
SIZE = re.compile("([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


class Row(NamedTuple):
    """One picture to paint: its task, and weights of adapters, None for the usual."""

    task: Task
    adapters: dict[str, float] | None = None


class Asked(NamedTuple):
    """A request: its pictures, and how they are returned."""

    rows: list[Row]
    response_format: str
    suffix: str  # of the files
    quality: int
    stream: bool
    partial_images: int


def asked(
    fields: Mapping[str, Any],
    config: ConfigDict,
    limits: Limits,
    *,
    model: str,
    adapters: Mapping[str, float],
    files: Mapping[str, str],
) -> Asked:
    """The pictures of checked fields; ApiError for what the server does not offer.

    `files` are paths of the uploads "image" and "mask". `adapters` are the server's.
    """
    if fields.get("model", model) != model:
        raise ApiError(
            404,
            f'model "{shown(fields["model"])}": this server has "{model}"',
            code="model_not_found",
            param="model",
        )
    count = fields.get("n", 1)
    _require_most("n", count, limits.n)
    _require_most("steps", fields.get("steps", 1), limits.steps)
    _require_texts(fields, limits)
    if fields.get("partial_images") and not fields.get("stream"):
        raise invalid("partial_images without stream; set stream to true", "stream")
    _require_most(
        "partial_images", fields.get("partial_images", 0), limits.partial_images
    )
    suffix = {"jpeg": "jpg"}.get(fields.get("output_format", "png"), None)
    return Asked(
        _rows(fields, config, limits, count, adapters, files),
        fields.get("response_format", "b64_json"),
        "." + (suffix or fields.get("output_format", "png")),
        fields.get("output_compression", config.sample.quality),
        bool(fields.get("stream", False)),
        fields.get("partial_images", 0),
    )


def _rows(fields, config, limits, count, adapters, files) -> list[Row]:
    size = _size(fields.get("size", "auto"), limits, sized=not files)
    # A request becomes a line, and is checked by the code that reads a line of
    # prompts_file: a picture can be repeated by `sample` from the line inside its file.
    line = {"prompt": fields["prompt"], "per_prompt": count}
    # Python's own generator would repeat its seeds in each process that is started.
    # Below 2**31, as picture i of a request has seed + i and must stay in 32 bits.
    line["seed"] = fields.get("seed", secrets.randbelow(2**31))
    line |= {
        EDITS[name].line: value for name, value in fields.items() if EDITS[name].line
    } | {"seed": line["seed"]}
    line |= dict(files)
    if size is not None:
        line |= {"height": size[0], "width": size[1]}
    try:
        looked = Looked()
        parsed = prompt_lines.read_fields(line, config, ".", looked)
        tasks = prompt_file.tasks_of([parsed], looked)
        if files:  # decoded now, so that a bad picture is no error of a whole batch
            line_arrays.read_checked_row(tasks[0].settings, tasks[0].size)
    except UserError as error:
        # The uploads' paths in the spool mean nothing to a client.
        text = str(error)
        for name, path in files.items():
            text = text.replace(path, name)
        raise of_mistake(UserError(text), NAMES) from None
    # All rows of a request have one size. An upload brings its own, which may not be
    # one of those that are compiled.
    for task in tasks[:1]:
        painted = task.settings["height"], task.settings["width"]
        if painted not in limits.sizes:
            raise _not_offered(painted, limits)
    weights = _adapters(fields.get("adapters"), adapters)
    return [Row(task, weights) for task in tasks]


def _size(text: str, limits: Limits, *, sized: bool) -> tuple[int, int] | None:
    """(height, width); None for "auto" of a picture that brings its own size."""
    if text == "auto":
        return limits.sizes[0] if sized else None
    match = SIZE.fullmatch(text)
    if not match:
        raise invalid(f'size "{shown(text)}": expected WIDTHxHEIGHT or auto', "size")
    size = int(match[2]), int(match[1])
    if size not in limits.sizes:
        raise _not_offered(size, limits)
    return size


def _not_offered(size: tuple[int, int], limits: Limits) -> ApiError:
    sizes = ", ".join(map(size_text, limits.sizes))
    return invalid(
        f"size {size_text(size)}: this server has compiled {sizes}",
        "size",
        "size_not_offered",
    )


def _require_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise invalid(f"{name} {value}: this server allows at most {most}", name)


def _require_texts(fields: Mapping[str, Any], limits: Limits) -> None:
    if not isinstance(fields.get("prompt"), str) or not fields["prompt"].strip():
        raise invalid("prompt: expected a text", "prompt", "missing_required_parameter")
    for name in ("prompt", "negative_prompt"):
        # "replace" counts halves of surrogate pairs, which a line's check refuses.
        size = len(fields.get(name, "").encode(errors="replace"))
        if size > limits.prompt_bytes:
            raise invalid(
                f"{name}: {size} bytes; this server allows {limits.prompt_bytes}", name
            )


def _adapters(value: Any, known: Mapping[str, float]) -> dict[str, float] | None:
    if value is None:
        # Without the field each adapter acts at the weight of its configuration.
        return dict(known) if known else None
    for name in value:
        if name not in known:
            raise invalid(f'adapters "{shown(name)}"{nearest(name, known)}', "adapters")
    try:
        # With adapters loaded, {} means all weights are 0; None is a model without any.
        return {
            name: argument_checks.number(f'adapters "{name}"', weight, -100, 100)
            for name, weight in value.items()
        } or ({} if known else None)
    except UserError as error:
        raise invalid(str(error), "adapters") from None
