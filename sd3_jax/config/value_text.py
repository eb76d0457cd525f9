"""Values as text on a command line: `read` is the inverse of `show`."""

import ast
import json
from typing import Any


def read(text: str, kind: type, old: Any) -> Any:
    """The value that a text means for a key of this type; `old` is its present one.

    ValueError or KeyError if it means none.
    """
    if kind in (tuple, list):
        # Items get the type of those that are there: 1 for a tuple of floats is 1.0.
        types = {type(item) for item in old or ()}
        if len(types) != 1:
            return kind(items(text))
        [item_type] = types
        return kind(read(str(item), item_type, None) for item in items(text))
    return READERS[kind](text)


READERS = {
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    int: int,
    float: float,
    str: str,
}


def items(text: str) -> tuple | list:
    """(1, 2) or [1, 2] or 1,2 or ("a", "b") or a,b: what is between the commas."""
    try:
        value = ast.literal_eval(text)
        return value if isinstance(value, tuple | list) else (value,)
    except (SyntaxError, ValueError):
        bare = text.strip("()[] ")
        return [item.strip() for item in bare.split(",") if item.strip()]


def hint(text: str, kind: type) -> str:
    """An int written as a float, 1e3, can be set right."""
    try:
        if kind is int and float(text).is_integer():
            return f'; did you mean "{int(float(text))}"?'
    except ValueError:
        pass
    return ""


def show(value: Any) -> str:
    """true, 0.1, text, or ("a", "b") for a tuple or a list."""
    if isinstance(value, tuple | list):
        # Commas alone would not do: a prompt may hold some.
        inside = ", ".join(
            json.dumps(x, ensure_ascii=False) if isinstance(x, str) else show(x)
            for x in value
        )
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    return str(value).lower() if isinstance(value, bool) else str(value)
