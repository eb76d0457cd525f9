"""Whether a config makes sense: each value alone, then values together."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from sd3_jax.config import schema
from sd3_jax.config.relations import RELATIONS
from sd3_jax.config.schema.key_rules import Rule
from sd3_jax.errors import ConfigError, near
from sd3_jax.foreign_text import shown


def validate(config: ConfigDict) -> None:
    """Raise a ConfigError that names the first value out of place; absent keys pass."""
    # Flat, because rules and relations name their keys with dots.
    values = dict(flatten(config))
    for key, (_, rule, *_) in schema.KEYS.items():
        value = values.get(key)
        if value is not None and not rule.holds(value):
            raise complaint(key, value, rule)

    if "model.depth" in values:  # the defaults of what is left open, as in the paper
        for key, default in (("model.width", 64), ("model.num_heads", 1)):
            if key in values and values[key] is None:
                values[key] = default * values["model.depth"]
    # After the rules: a relation may rely on each of its values alone being valid.
    for relation, *keys in RELATIONS:
        if all(values.get(key) is not None for key in keys):
            expectation = relation(*(values[key] for key in keys))
            if expectation:
                raise complaint(keys[0], values[keys[0]], Rule(bool, expectation))


def flatten(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every group, as a dict, and every leaf, by its dotted key."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, ConfigDict):
            yield key, value.to_dict()
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def leaves(tree: ConfigDict | dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf by its dotted key, and no group."""
    for name, value in tree.items():
        if isinstance(value, ConfigDict | dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def complaint(key: str, value: Any, rule: Rule) -> ConfigError:
    """The error of a value that its key's rule forbids."""
    several = value if isinstance(value, tuple | list) else [value]
    wrong = (str(x) for x in several if str(x) not in rule.choices)
    guess = next(filter(None, (near(text, rule.choices) for text in wrong)), None)
    hint = f'; did you mean "{guess}"?' if guess else ""
    return ConfigError(f"config.{key} = {as_text(value)}: expected {rule.wanted}{hint}")


def as_text(value: Any) -> str:
    """A value as an error shows it; texts in quotes, with their controls escaped."""
    if isinstance(value, str):
        return f'"{shown(value, 1_000)}"'
    if isinstance(value, tuple | list):
        end = "," if len(value) == 1 else ""
        return f"({', '.join(map(as_text, value))}{end})"
    return str(value)
