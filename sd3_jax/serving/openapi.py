"""The OpenAPI schema of the routes, made from the table of fields."""

from sd3_jax.serving.limits import Limits, size_text
from sd3_jax.serving.request_fields import EDITS, GENERATION, Field

ERROR = {"$ref": "#/components/schemas/Error"}


def schema(limits: Limits, model: str) -> dict:
    """An OpenAPI 3.1 document, as JSON."""
    fields = {name: _property(x) for name, x in GENERATION.items()}
    edits = {name: _property(x) for name, x in EDITS.items()}
    for table in fields, edits:
        # The limits of this server narrow those of the table, which hold for any.
        table["size"]["enum"] = ["auto", *map(size_text, limits.sizes)]
        table["n"]["maximum"] = limits.n
        table["steps"]["maximum"] = limits.steps
        table["partial_images"]["maximum"] = limits.partial_images
        table["model"]["enum"] = [model]
    return {
        "openapi": "3.1.0",
        "info": {"title": "sd3_jax", "version": "1"},
        "paths": {
            "/v1/images/generations": {
                "post": _operation(
                    "Pictures of a prompt", "application/json", fields, ["prompt"]
                )
            },
            "/v1/images/edits": {
                "post": _operation(
                    "A picture, changed",
                    "multipart/form-data",
                    edits,
                    ["prompt", "image"],
                )
            },
            "/v1/models": {"get": _getter("The served model")},
            "/v1/models/{name}": {"get": _getter("The served model", name="name")},
            "/pictures/{name}": {
                "get": _getter("A picture by its URL", "image/*", name="name")
            },
            "/": {"get": _getter("The endpoints", "text/plain")},
            "/healthz": {"get": _getter("Whether the server lives")},
            "/readyz": {"get": _getter("Whether it takes requests")},
            "/metrics": {"get": _getter("For Prometheus", "text/plain")},
        },
        "components": {
            "schemas": {"Error": _error()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _property(field: Field) -> dict:
    if field.form:
        return {"type": "string", "format": "binary", "description": field.about}
    about: dict = {"type": field.kind, "description": field.about}
    if field.choices:
        about["enum"] = list(field.choices)
    if field.low is not None:
        about |= {"minimum": field.low, "maximum": field.high}
    if field.kind == "object":
        about["additionalProperties"] = {"type": "number"}
    return about


def _operation(about: str, kind: str, fields: dict, required: list[str]) -> dict:
    body = {"type": "object", "properties": fields, "required": required}
    # request_fields.checked refuses unknown fields as well.
    body["additionalProperties"] = False
    answer = {"application/json": {"schema": _answer()}}
    # OpenAPI 3.1 cannot describe the events of a stream, only its media type.
    answer["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": about,
        # {} means "none": a server without keys_file asks for no key.
        "security": [{}, {"key": []}],
        "requestBody": {"required": True, "content": {kind: {"schema": body}}},
        "responses": {"200": {"description": about, "content": answer}}
        | {str(status): _fault() for status in ERRORS},
    }


# What a client may meet; a 5xx is the server's end, or a fault of its machine.
ERRORS = (400, 401, 404, 408, 413, 415, 429, 503, 504)


def _getter(about: str, kind: str = "application/json", name: str = "") -> dict:
    operation: dict = {
        "summary": about,
        "responses": {
            "200": {"description": about, "content": {kind: {}}},
            **{str(status): _fault() for status in (401, 404, 503)},
        },
    }
    if name:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation


def _answer() -> dict:
    text = {"type": "string"}
    picture = {"b64_json": text, "url": text, "seed": {"type": "integer"}}
    return {
        "type": "object",
        "required": ["created", "data"],
        "properties": {
            "created": {"type": "integer"},
            "data": {
                "type": "array",
                "items": {"type": "object", "properties": picture},
            },
        },
    }


def _fault() -> dict:
    content = {"application/json": {"schema": ERROR}}
    return {"description": "OpenAI's error object", "content": content}


def _error() -> dict:
    # JSON Schema 2020-12, which OpenAPI 3.1 uses, has lists of types and no `nullable`.
    text = {"type": ["string", "null"]}
    names = ("message", "type", "param", "code")
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": list(names),
                "properties": {name: text for name in names},
            }
        },
    }
