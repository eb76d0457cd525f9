"""LoRA (Hu et al. 2021) on a tree of parameters: which weights, attached or merged.

A LoRA is the parameters' tree cut down to the linear maps that it adapts, each of them
{"a": ..., "b": ...} as LowRank has them.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sd3_jax.errors import UserError, near
from sd3_jax.params.parametrization import LowRank

# Dense layers that fuse maps along their first output axis, and those of more than two
# axes that do not; any other weight of more than two is a convolution's.
SHOWN = 12  # paths in an error, at most
FUSED = ("to_qkv", "to_kv", "wi")
MANY = ("to_q", "to_k", "to_v", "to_out", "linear")


class Layout(NamedTuple):
    """How a kernel's axes lie: layers, inputs, groups, the other outputs."""

    layers: int  # 0 or 1 axis
    inputs: int
    groups: int  # 0 or 1 axis

    def shapes(self, kernel: tuple, rank: Any) -> tuple[tuple, tuple]:
        """Of a and b; or of their axes' names, of the kernel's."""
        start = self.layers + self.inputs
        layers, groups = kernel[: self.layers], kernel[start : start + self.groups]
        a = (*kernel[:start], *groups, rank)
        return a, (*layers, *groups, rank, *kernel[start + self.groups :])


def layout(path: tuple[str, ...], ndim: int) -> Layout | None:
    """Of the kernel below a module's path; None where that is no linear map."""
    layers = int(any(name.endswith("blocks") for name in path))
    name, axes = path[-1], ndim - layers
    if axes < 2 or axes > 2 and name not in FUSED + MANY:
        return None
    inputs = axes - 1 if name == "to_out" else 1
    return Layout(layers, inputs, int(name in FUSED))


def layout_of(path: tuple[str, ...], pair: dict) -> Layout:
    """Of the kernel that a pair below a module's path adapts."""
    layers = int(any(name.endswith("blocks") for name in path))
    groups = int(path[-1] in FUSED)
    return Layout(layers, pair["a"].ndim - layers - groups - 1, groups)


def kernels(params: Any) -> dict[tuple[str, ...], Any]:
    """The kernels of all linear maps by their modules' paths; boxes stay closed."""
    by_path = {}
    for path, module in modules(params, "kernel"):
        kernel = module["kernel"]
        if layout(path, len(_open(kernel).shape)) is not None:
            by_path[path] = kernel
    return by_path


def modules(tree: Any, name: str) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The dictionaries of a tree that have an entry of this name, with their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if name in value:
                yield (key,), value
            yield from (((key, *path), x) for path, x in modules(value, name))


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict:
    """A tree of dictionaries from what lies at its paths."""
    root: dict = {}
    for (*path, last), value in flat.items():
        place = root
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return root


def init(key: Array, params: Any, *, rank: int, targets: str = "") -> dict:
    """The params' tree, cut down to {"a", "b"} of the targeted linear maps.

    a is normal with deviation 1 / rank, as in diffusers' script for SD3, b is zero: the
    model is at first what it was. Both are float32. Of params only the shapes matter
    and, where they are boxed, the names of axes, which a and b then have.
    """
    targeted = target_kernels(params, targets)
    lora = {}
    keys = jax.random.split(key, len(targeted))
    for a_key, (path, kernel) in zip(keys, targeted.items()):
        boxed = isinstance(kernel, nn.LogicallyPartitioned)
        shape = (kernel.value if boxed else kernel).shape
        axes = layout(path, len(shape))
        first, second = axes.shapes(tuple(shape), rank)
        pair = [jax.random.normal(a_key, first) / rank, jnp.zeros(second)]
        if boxed:
            names = axes.shapes(kernel.names, None)
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
        axes = layout_of(path, pair)
        inputs = tuple(range(axes.layers, axes.layers + axes.inputs))
        absent = jnp.all(pair["a"] == 0, axis=inputs, keepdims=True)
        a = jnp.where(absent, flat[path]["a"], pair["a"])
        flat[path] = {"a": a, "b": jnp.asarray(pair["b"])}
    return nested(flat)


def target_kernels(params: Any, targets: str) -> dict[tuple[str, ...], Any]:
    """Kernels of the linear maps in whose path, such as "blocks/image/attn/to_qkv",
    the regex `targets` is found; of all of them for ""."""
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f'LoRA targets "{targets}": no regex: {error}') from None
    every = {"/".join(path): (path, x) for path, x in kernels(params).items()}
    every = dict(sorted(every.items()))  # the same draws, however a tree is ordered
    matching = [name for name in every if pattern.search(name)]
    if not matching:
        match = near(
            targets, [*every, *(part for p, _ in every.values() for part in p)]
        )
        shown = ", ".join(list(every)[:SHOWN]) + (", …" if len(every) > SHOWN else "")
        hint = f'; did you mean "{match}"?' if match else f"; wanted a part of {shown}"
        raise UserError(f'LoRA targets "{targets}" are in no linear map{hint}')
    return dict(every[name] for name in matching)


def attach(params: dict, lora: dict, *, alpha: float = 0.0, weight: float = 1.0):
    """`params` with LowRank leaves where `lora` has matrices, times `weight`.

    `alpha` 0 is the rank. What is attached already stays: several add up. Raises
    ValueError where `params` have no such kernel, or one of another shape.
    """
    change = functools.partial(_low_rank, alpha=alpha, weight=weight)
    for path, pair in modules(lora, "a"):
        params = replaced(params, path, functools.partial(change, path, pair))
    return params


def merge(params: dict, lora: dict, *, alpha: float = 0.0, weight: float = 1.0):
    """What attach makes as plain arrays; for a model that is as fast as it was.

    Of a kernel in eight bits too, whose rounding would take the update away again.
    """
    change = lambda *args: _low_rank(*args, alpha=alpha, weight=weight).array()
    for path, pair in modules(lora, "a"):
        params = replaced(params, path, functools.partial(change, path, pair))
    return params


def unmerge(params: dict, lora: dict, *, alpha: float = 0.0, weight: float = 1.0):
    """What `params` were before merge, to the rounding of their dtype."""
    return merge(params, lora, alpha=alpha, weight=-weight)


def replaced(params: dict, path: tuple[str, ...], change) -> dict:
    """A copy of the dictionaries on the way to a kernel, which `change` makes anew."""
    if not path:
        return params | {"kernel": change(params["kernel"])}
    first, *rest = path
    if not isinstance(params, dict) or first not in params:
        raise ValueError(f"LoRA: no parameters {first}, only {', '.join(params)}")
    return params | {first: replaced(params[first], tuple(rest), change)}


def _low_rank(path, pair, kernel, *, alpha, weight) -> LowRank:
    a, b = pair["a"], pair["b"]
    shape, rank, name = tuple(kernel.shape), a.shape[-1], "/".join(path)
    axes = layout(path, len(shape))
    if axes is None or axes.shapes(shape, rank) != (a.shape, b.shape):
        wanted = "a linear map" if axes is None else axes.shapes(shape, rank)
        raise ValueError(
            f"LoRA {name}: a {a.shape}, b {b.shape} for a kernel {shape}: wanted"
            f" {wanted}"
        )
    scale = weight * (alpha / rank if alpha else 1.0)
    return LowRank(kernel, a, b, scale, bool(axes.groups))


def _open(x: Any) -> Any:
    return x.value if isinstance(x, nn.LogicallyPartitioned) else x
