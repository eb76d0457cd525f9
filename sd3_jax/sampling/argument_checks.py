"""Checks of numbers, pairs and texts from callers; errors name the argument."""

import numbers
import os
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown

LARGEST = float(np.finfo(np.float32).max)  # programs compute in float32


def number(
    name: str, value: Any, low: float | int = -LARGEST, high: float | int = LARGEST
) -> float:
    """A finite number in [low, high]: Python's, numpy's or a 0-d array."""
    x = _scalar(value)
    # bool is a subclass of int in Python, but True is no number that a caller means.
    real = isinstance(x, numbers.Real) and not isinstance(x, bool)
    if not real or not low <= x <= high:  # NaN is in no range
        whole_range = (low, high) == (-LARGEST, LARGEST)
        wanted = (
            "a finite number" if whole_range else f"a number in [{low:g}, {high:g}]"
        )
        raise UserError(f"{name} {spelled(value)}: expected {wanted}")
    return float(x)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]; a float is none, not even 2.0."""
    x = _scalar(value)
    integral = isinstance(x, numbers.Integral) and not isinstance(x, bool)
    if not integral or not low <= x <= high:
        raise UserError(
            f"{name} {spelled(value)}: expected a whole number {low} to {high}"
        )
    return int(x)


def pair(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 2:
        raise UserError(f"{name} {spelled(value)}: expected two numbers")
    low, high = number(name, value[0]), number(name, value[1])
    if low > high:
        raise UserError(f"{name} {(low, high)}: expected the lower number first")
    return low, high


def instance(name: str, value: Any, kinds: tuple[type, ...], source: str) -> None:
    """UserError unless the value is of these classes; `source` makes one."""
    if not isinstance(value, kinds):
        wanted = " or ".join(f"a {kind.__name__}" for kind in kinds)
        raise UserError(f"{name} {spelled(value)}: expected {wanted}, from {source}")


def path_text(name: str, value: Any, expected: str) -> str:
    """A path or hub name as text; UserError, which says what is `expected`, if not."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:  # paths of bytes are none
        raise UserError(f"{name} {spelled(value)}: expected {expected}")
    return text


def spelled(value: Any) -> str:
    """A value as a line of Python, even one that refuses to be written."""
    try:
        return shown(repr(value))
    except Exception:  # such as ValueError, of an int of more than 4300 digits
        return f"of class {type(value).__name__}"


def skip_layers(value: Any, depth: int, name: str = "skip_layers") -> list[int]:
    """Numbers of layers below `depth`; None is the empty list."""
    if value is None:
        return []
    # A string would pass as a sequence of characters, so the accepted types are listed.
    if not isinstance(value, list | tuple | range | set) and not (
        hasattr(value, "__array__") and np.ndim(value) == 1
    ):
        raise UserError(f"{name} {spelled(value)}: expected a list of whole numbers")
    return [whole(name, x, 0, depth - 1) for x in value]


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{name} {spelled(value)}: expected one of {', '.join(choices)}"
        )
    if value not in choices:
        raise UserError(f'{name} "{shown(value)}"{nearest(value, choices)}')
    return value


def rows_of(x: Array | np.ndarray, rows: int, per_prompt: int, label: str) -> Array:
    """x with one row for each picture, from 1, one a prompt or one a picture."""
    n = x.shape[0]
    if n == rows:
        return jnp.asarray(x)
    # rows are ordered p0, p0, p1, p1, …: one per prompt is repeated within its prompt.
    if n in (1, rows // per_prompt):
        return jnp.repeat(jnp.asarray(x), rows // n, axis=0)
    counts = ", ".join(map(str, sorted({1, rows // per_prompt, rows})))
    raise UserError(f"{n} of {label} for {rows} pictures: expected one of {counts}")


def _scalar(value: Any) -> Any:
    """The number that an array without axes holds."""
    # jnp.float32(1) and np.array(1) have no axes; .item() waits for the device once,
    # here.
    array = hasattr(value, "__array__") and not isinstance(value, np.generic)
    return value.item() if array and np.ndim(value) == 0 else value


def latent_sides(sides: Sequence[int], patch: int, pos_size: int) -> None:
    """UserError for latents that do not divide into patches with positions."""
    most = patch * pos_size
    if any(side % patch or not 0 < side <= most for side in sides):
        raise UserError(
            f"latents of {sides[0]} x {sides[1]}: expected sides that are multiples of"
            f" {patch}, at most {most}"
        )


def embedding(name: str, x: Any, axes: int, width: int | None) -> None:
    """UserError unless x is an array of `axes` axes, of which the last is `width`."""
    shape = getattr(x, "shape", None)
    if shape is None or len(shape) != axes or width not in (None, shape[-1]):
        layout = "(b, tokens" if axes == 3 else "(b"
        description = (
            shown(repr(x), 60) if shape is None else f"of shape {tuple(shape)}"
        )
        raise UserError(f"{name} {description}: expected an array {layout}, {width})")
