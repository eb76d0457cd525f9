"""LoRA (Hu et al. 2021) on a tree of parameters: which weights, attached or merged.

A LoRA is the parameters' tree cut down to the linear maps that it adapts, each of them
{"a": ..., "b": ...} as LowRank has them.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from sd3_jax.models.leaves import LowRank

# Dense layers that fuse maps along their first output axis, and those of more than two
# axes that do not; any other weight of more than two is a convolution's.
FUSED = ("to_qkv", "to_kv", "wi")
MANY = ("to_q", "to_k", "to_v", "to_out", "linear")


class Layout(NamedTuple):
    """How a kernel's axes lie: layers, inputs, groups, the other outputs."""

    layers: int  # 0 or 1 axis
    inputs: int
    groups: int  # 0 or 1 axis

    def shapes(self, kernel: tuple, rank: Any) -> tuple[tuple, tuple]:
        """Of a and b; or of their axes' names, of the kernel's."""
        start, own = self.layers + self.inputs, self.groups
        layers, groups = kernel[: self.layers], kernel[start : start + own]
        a = (*kernel[:start], *groups, rank)
        return a, (*layers, *groups, rank, *kernel[start + own :])


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
    found = {}
    for path, module in modules(params, "kernel"):
        kernel = module["kernel"]
        if layout(path, len(_open(kernel).shape)) is not None:
            found[path] = kernel
    return found


def modules(tree: Any, name: str) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The dictionaries of a tree that have an entry of this name, with their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if name in value:
                yield (key,), value
            yield from (((key, *path), x) for path, x in modules(value, name))


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict:
    """A tree of dictionaries from what lies at its paths."""
    made: dict = {}
    for (*path, last), value in flat.items():
        place = made
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return made


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
    lies = layout(path, len(shape))
    if lies is None or lies.shapes(shape, rank) != (a.shape, b.shape):
        wanted = "a linear map" if lies is None else lies.shapes(shape, rank)
        raise ValueError(
            f"LoRA {name}: a {a.shape}, b {b.shape} for a kernel {shape}: wanted"
            f" {wanted}"
        )
    scale = weight * (alpha / rank if alpha else 1.0)
    return LowRank(kernel, a, b, scale, bool(lies.groups))


def _open(x: Any) -> Any:
    return x.value if isinstance(x, nn.LogicallyPartitioned) else x
