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
        parts = texts(text) if item_type is str else items(text)
        return kind(read(str(item), item_type, None) for item in parts)
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
        return split(text)


def texts(text: str) -> tuple | list:
    """The same where all items are texts: 1_000 and 1e3 stay as they are."""
    values = items(text)
    return values if all(isinstance(x, str) for x in values) else split(text)


def split(text: str) -> list[str]:
    """The texts between commas. ValueError if one that is not the last is empty.

    Brackets around the whole list are left out, but those of one text are its own:
    "a fox (at night)", "(a fox)" and "train-0[0-4]" are whole. A comma in brackets
    divides nothing. Quotes keep any text: '("(a, b)",)'.
    """
    text = text.strip()
    cuts = commas(text)
    if not cuts and encloses(text) and commas(text[1:-1]):
        text = text[1:-1].strip()
        cuts = commas(text)
    bounds = [-1, *cuts, len(text)]
    parts = [text[a + 1 : b].strip() for a, b in zip(bounds, bounds[1:])]
    if parts and not parts[-1]:
        parts.pop()  # after a last comma, or of an empty text
    if not all(parts):
        raise ValueError("an empty text between two commas")
    return parts


def commas(text: str) -> list[int]:
    """Where the commas outside brackets are; all of them if the brackets do not match.

    Brackets that do not match are text, such as ":(".
    """
    depth, places = 0, []
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth < 0:
            break
        if letter == "," and not depth:
            places.append(i)
    if depth:
        return [i for i, letter in enumerate(text) if letter == ","]
    return places


def encloses(text: str) -> bool:
    """Whether the first letter is a bracket and the last one closes it."""
    if text[:1] + text[-1:] not in ("()", "[]"):
        return False
    depth = 0
    for letter in text[:-1]:
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return False
    return True


def hint(text: str, kind: type) -> str:
    """What to write instead: 1000 for 1e3, and "" for a text of a list."""
    if kind in (tuple, list) and any(not x.strip() for x in text.split(",")):
        return '; write "" in quotes for an empty text'
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
