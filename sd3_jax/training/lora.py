"""A new LoRA for a tree of parameters, on the linear maps that a regex finds."""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sd3_jax.errors import UserError, near
from sd3_jax.models.lora import (
    attach,
    kernels,
    layout,
    layout_of,
    merge,
    modules,
    nested,
    unmerge,
)

__all__ = ["attach", "chosen", "init", "merge", "started", "unmerge"]
SHOWN = 12  # paths in an error, at most


def init(key: Array, params: Any, *, rank: int, targets: str = "") -> dict:
    """The params' tree, cut down to {"a", "b"} of the linear maps that are `chosen`.

    a is normal with deviation 1 / rank, as in diffusers' script for SD3, b is zero: the
    model is at first what it was. Both are float32. Of params only the shapes matter
    and, where they are boxed, the names of axes, which a and b then have.
    """
    found = chosen(params, targets)
    lora = {}
    keys = jax.random.split(key, len(found))
    for own, (path, kernel) in zip(keys, found.items()):
        boxed = isinstance(kernel, nn.LogicallyPartitioned)
        shape = (kernel.value if boxed else kernel).shape
        lies = layout(path, len(shape))
        first, second = lies.shapes(tuple(shape), rank)
        pair = [jax.random.normal(own, first) / rank, jnp.zeros(second)]
        if boxed:
            names = lies.shapes(kernel.names, None)
            pair = [nn.LogicallyPartitioned(x, n) for x, n in zip(pair, names)]
        lora[path] = dict(zip("ab", pair))
    return nested(lora)


def started(new: dict, adapter: dict) -> dict:
    """A new LoRA with the matrices of `adapter`, where this has some; arrays.

    Where all inputs of a rank's column of a are zero, in a layer or a group, `new` has
    them still: of a and b that are both zero neither would have a gradient.
    """
    flat = dict(modules(new, "a"))
    for path, pair in modules(adapter, "a"):
        lies = layout_of(path, pair)
        inputs = tuple(range(lies.layers, lies.layers + lies.inputs))
        absent = jnp.all(pair["a"] == 0, axis=inputs, keepdims=True)
        a = jnp.where(absent, flat[path]["a"], pair["a"])
        flat[path] = {"a": a, "b": jnp.asarray(pair["b"])}
    return nested(flat)


def chosen(params: Any, targets: str) -> dict[tuple[str, ...], Any]:
    """Kernels of the linear maps in whose path, such as "blocks/image/attn/to_qkv",
    the regex `targets` is found; of all of them for ""."""
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f'LoRA targets "{targets}": no regex: {error}') from None
    every = {"/".join(path): (path, x) for path, x in kernels(params).items()}
    every = dict(sorted(every.items()))  # the same draws, however a tree is ordered
    found = [name for name in every if pattern.search(name)]
    if not found:
        match = near(
            targets, [*every, *(part for p, _ in every.values() for part in p)]
        )
        some = ", ".join(list(every)[:SHOWN]) + (", …" if len(every) > SHOWN else "")
        hint = f'; did you mean "{match}"?' if match else f"; wanted a part of {some}"
        raise UserError(f'LoRA targets "{targets}" are in no linear map{hint}')
    return dict(every[name] for name in found)
