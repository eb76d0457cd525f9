"""The fields of a request: OpenAI's, and ours, with their types and what they mean.

One table is read by the parser and by the OpenAPI schema (openapi.py).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from sd3_jax.errors import nearest
from sd3_jax.foreign_text import parse_json, shown
from sd3_jax.serving.api_errors import invalid

FORMATS = ("png", "jpeg", "webp")


class Field(NamedTuple):
    """A field's type and meaning; `line` is its name in a line of `sample`'s prompts.

    Numbers are in [low, high]; further limits are those of a line's setting.
    """

    kind: str  # of JSON: string, integer, number, boolean, array, object
    about: str
    line: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple = ()
    form: str = ""  # "file" for an upload; fields of edits alone are named in EDITS


# OpenAI's API reference, "Create image".
OPENAI = {
    "prompt": Field("string", "What the picture shows."),
    "model": Field("string", "A name of /v1/models; by default the served model."),
    "n": Field("integer", "Number of pictures.", low=1, high=4096),
    "size": Field("string", 'WIDTHxHEIGHT, or "auto" for the first of the server.'),
    "response_format": Field(
        "string", "How pictures are returned.", choices=("b64_json", "url")
    ),
    "output_format": Field("string", "Format of the pictures.", choices=FORMATS),
    "output_compression": Field(
        "integer", "Quality of jpeg and webp, in percent.", low=1, high=100
    ),
    "stream": Field("boolean", "Whether to answer by server-sent events."),
    "partial_images": Field(
        "integer", "Previews of each picture in a stream.", low=0, high=3
    ),
    # Accepted with the values that describe what this model does.
    "quality": Field("string", "The model has one quality.", choices=("auto",)),
    "background": Field("string", "Pictures are opaque.", choices=("auto", "opaque")),
    "moderation": Field(
        "string", "The server's filter decides.", choices=("auto", "low")
    ),
    "user": Field("string", "An identifier of yours, which is not used."),
}
OURS = {
    "seed": Field(
        "integer",
        "Seed of the noise; picture i has seed + i. By default a random one, which the"
        " answer names.",
        "seed",
        # Seeds are uint32 in the programs.
        low=0,
        high=2**32 - 1,
    ),
    "steps": Field("integer", "Solver steps.", "steps", low=1, high=10_000),
    "guidance": Field("number", "Scale of guidance.", "cfg", low=0, high=1_000),
    "negative_prompt": Field("string", "What to steer away from.", "negative"),
    "solver": Field("string", "Solver of the flow.", "solver"),
    "grid": Field("string", "Grid of times.", "grid"),
    "shift": Field("number", "Shift of the grid.", "shift", low=0, high=1_000),
    "guidance_start": Field(
        "number", "Least t at which guidance acts.", "cfg_start", low=0, high=1
    ),
    "guidance_stop": Field(
        "number", "Largest t at which guidance acts.", "cfg_stop", low=0, high=1
    ),
    "guidance_rescale": Field(
        "number", "Rescaling of guidance.", "rescale", low=0, high=1
    ),
    "adapters": Field("object", "Weights of the server's adapters, by name."),
}
EDIT = {
    "image": Field("string", "The picture to change (PNG, JPEG, WebP).", form="file"),
    "mask": Field(
        "string",
        "Transparent, or white in a grey picture, where the picture is repainted.",
        form="file",
    ),
    "strength": Field(
        "number", "Share of the steps that change it.", "strength", low=0, high=1
    ),
    "resize": Field(
        "string",
        "How the picture gets `size`: crop, stretch, or by default not at all.",
        "resize",
        choices=("crop", "stretch"),
    ),
    "paste": Field("boolean", "Whether pixels outside the mask stay.", "paste"),
    "mask_blur": Field("number", "Blur of the mask.", "mask_blur", low=0, high=4096),
    "mask_padding": Field(
        "integer", "Pixels by which the mask grows.", "mask_padding", low=0, high=4096
    ),
}
GENERATION = OPENAI | OURS
EDITS = GENERATION | EDIT
# The API's names by those of a line, for messages of the line's checks.
NAMES = {field.line: name for name, field in EDITS.items() if field.line}
NAMES |= {"height": "size", "width": "size"}


def of_json(body: bytes) -> dict[str, Any]:
    """The checked fields of a JSON body; ApiError for anything else."""
    try:
        fields = parse_json(body)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    return checked(fields, GENERATION)


def of_form(texts: Mapping[str, str]) -> dict[str, Any]:
    """The checked fields of a form, whose values are texts."""
    fields = {}
    for name, text in texts.items():
        field = EDITS.get(name)
        kind = field.kind if field is not None else "string"
        if field is not None and field.form:
            raise invalid(f"{name}: expected a file", name)
        if kind == "string":
            fields[name] = text
            continue
        try:
            # A form has texts alone: "7" and "true" are read as JSON of the field's
            # type.
            fields[name] = parse_json(text)
        except (ValueError, RecursionError):
            raise invalid(
                f"{name} {shown(text)}: expected {article(kind)}", name
            ) from None
    return checked(fields, EDITS)


def checked(fields: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The fields that are not null, each of its type and in its range."""
    for name in fields:
        if name not in table:
            choices = nearest(str(name), [x for x in table if not table[x].form])
            raise invalid(
                f'unknown field "{shown(name)}"{choices}',
                shown(name),
                "unknown_parameter",
            )
    # OpenAI's clients send null for options that a program leaves unset.
    values = {name: x for name, x in fields.items() if x is not None}
    for name, value in values.items():
        require(name, value, table[name])
    return values


KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
}


def require(name: str, value: Any, field: Field) -> None:
    is_kind = isinstance(value, KINDS[field.kind])
    if isinstance(value, bool) and field.kind != "boolean":  # a bool is an int
        is_kind = False
    if not is_kind:
        raise invalid(
            f"{name} {shown(repr(value))}: expected {article(field.kind)}",
            name,
            "invalid_type",
        )
    if field.choices and value not in field.choices:
        raise invalid(
            f"{name} {shown(value)}: expected one of {', '.join(field.choices)}", name
        )
    if field.low is not None:
        # Compared before it becomes a float: an integer may be too large for one.
        inside = field.low <= value <= field.high and math.isfinite(float(value))
        if not inside:
            raise invalid(
                f"{name} {shown(value)}: expected {field.low} to {field.high}", name
            )


def article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
