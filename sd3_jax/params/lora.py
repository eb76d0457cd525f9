"""LoRA (Hu et al. 2021) on a tree of parameters: create, attach, merge.

A LoRA is a tree with the paths of the linear maps that it adapts. Each leaf module is
{"a": ..., "b": ...}, in the shapes of parametrization.LowRank.
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

SHOWN = 12  # paths in an error, at most
# Names of Dense layers whose first output axis counts fused maps, each of which has an
# a and b of its own, as in files of diffusers and PEFT.
FUSED = ("to_qkv", "to_kv", "wi")
# Dense layers of more than two axes that fuse nothing. Any other kernel of more than
# two axes is a convolution's, which no LoRA adapts here.
MANY = ("to_q", "to_k", "to_v", "to_out", "linear")


class Layout(NamedTuple):
    """Number of axes of each kind in a kernel: layers, inputs, groups, then outputs."""

    layers: int  # 0 or 1 axis
    inputs: int
    groups: int  # 0 or 1 axis

    def shapes(self, kernel: tuple, rank: Any) -> tuple[tuple, tuple]:
        """Shapes of a and b from the kernel's, or their axis names from its names."""
        start = self.layers + self.inputs
        layers, groups = kernel[: self.layers], kernel[start : start + self.groups]
        a = (*kernel[:start], *groups, rank)
        # a (layers, inputs, groups, rank), b (layers, groups, rank, outputs)
        return a, (*layers, *groups, rank, *kernel[start + self.groups :])


def layout(path: tuple[str, ...], ndim: int) -> Layout | None:
    """Layout of the kernel at a module's path; None if it is not a linear map.

    Kernels have no axis names once unboxed, so the module's name decides.
    """
    # Scanned modules are called "...blocks", and stack layers in their first axis.
    layers = int(any(name.endswith("blocks") for name in path))
    name, axes = path[-1], ndim - layers
    if axes < 2 or axes > 2 and name not in FUSED + MANY:
        return None
    inputs = axes - 1 if name == "to_out" else 1  # to_out takes heads and head size
    return Layout(layers, inputs, int(name in FUSED))


def layout_of(path: tuple[str, ...], pair: dict) -> Layout:
    """Layout of the kernel that the pair {"a", "b"} at a module's path adapts."""
    layers = int(any(name.endswith("blocks") for name in path))
    groups = int(path[-1] in FUSED)
    return Layout(layers, pair["a"].ndim - layers - groups - 1, groups)


def kernels(params: Any) -> dict[tuple[str, ...], Any]:
    """Kernels of all linear maps by module path; logical axis boxes are kept."""
    by_path = {}
    for path, module in modules(params, "kernel"):
        kernel = module["kernel"]
        if layout(path, len(_open(kernel).shape)) is not None:
            by_path[path] = kernel
    return by_path


def modules(tree: Any, name: str) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(path, dictionary) for each dictionary of a tree with an entry of this name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if name in value:
                yield (key,), value
            yield from (((key, *path), x) for path, x in modules(value, name))


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict:
    """Nested dictionaries from a flat mapping of paths to leaves."""
    root: dict = {}
    for (*path, last), value in flat.items():
        place = root
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return root


def init(key: Array, params: Any, *, rank: int, targets: str = "") -> dict:
    """A new LoRA {"a", "b"}, float32, of the linear maps that `targets` names.

    a is normal with standard deviation 1 / rank, as in diffusers' training script for
    SD3, and b is zero, so that the model is unchanged at first. `params` may be shapes.
    If they are boxed, a and b have the kernel's axis names. Raises UserError as
    target_kernels does.
    """
    targeted = target_kernels(params, targets)
    lora = {}
    keys = jax.random.split(key, len(targeted))  # one a map, in the order of names
    for a_key, (path, kernel) in zip(keys, targeted.items()):
        boxed = isinstance(kernel, nn.LogicallyPartitioned)  # with logical axis names
        shape = (kernel.value if boxed else kernel).shape
        axes = layout(path, len(shape))
        first, second = axes.shapes(tuple(shape), rank)
        pair = [jax.random.normal(a_key, first) / rank, jnp.zeros(second)]
        if boxed:
            names = axes.shapes(kernel.names, None)  # the rank is not sharded
            pair = [nn.LogicallyPartitioned(x, n) for x, n in zip(pair, names)]
        lora[path] = dict(zip("ab", pair))
    return nested(lora)


def started(new: dict, adapter: dict) -> dict:
    """`new` with the matrices of the loaded LoRA `adapter` where it has any.

    A rank whose column of a is zero, in a layer or group, keeps that column of `new`.
    """
    # Files fill missing layers and short ranks with zeros. If a and b are both zero,
    # neither has a gradient, and that rank would never train.
    flat = dict(modules(new, "a"))
    for path, pair in modules(adapter, "a"):
        axes = layout_of(path, pair)
        inputs = tuple(range(axes.layers, axes.layers + axes.inputs))
        absent = jnp.all(pair["a"] == 0, axis=inputs, keepdims=True)  # (..., 1, rank)
        a = jnp.where(absent, flat[path]["a"], pair["a"])
        flat[path] = {"a": a, "b": jnp.asarray(pair["b"])}
    return nested(flat)


def target_kernels(params: Any, targets: str) -> dict[tuple[str, ...], Any]:
    """Kernels of linear maps by path, of those that the regex `targets` matches.

    It is searched in paths such as "blocks/image/attn/to_qkv"; "" takes all. Raises
    UserError for a bad regex, and if no path matches.
    """
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(
            f'LoRA targets "{targets}": not a regular expression: {error}'
        ) from None
    every = {"/".join(path): (path, x) for path, x in kernels(params).items()}
    every = dict(sorted(every.items()))  # the same random draws for any order of keys
    matching = [name for name in every if pattern.search(name)]
    if not matching:
        match = near(
            targets, [*every, *(part for p, _ in every.values() for part in p)]
        )
        shown = ", ".join(list(every)[:SHOWN]) + (", …" if len(every) > SHOWN else "")
        hint = (
            f'; did you mean "{match}"?' if match else f"; expected a part of {shown}"
        )
        raise UserError(f'LoRA targets "{targets}" match no linear layer{hint}')
    return dict(every[name] for name in matching)


def attach(params: dict, lora: dict, *, alpha: float = 0.0, weight: float = 1.0):
    """`params` with LowRank leaves for the kernels that `lora` adapts.

    The update is scaled by weight * alpha / rank; `alpha` 0 stands for the rank.
    LoRAs that are already attached stay, and add up. Raises ValueError if `params` has
    no such kernel, or one of another shape.
    """
    change = functools.partial(_low_rank, alpha=alpha, weight=weight)
    for path, pair in modules(lora, "a"):
        params = replaced(params, path, functools.partial(change, path, pair))
    return params


def merge(params: dict, lora: dict, *, alpha: float = 0.0, weight: float = 1.0):
    """`params` with the updates added to the kernels, which become plain arrays.

    The merged model is as fast as the original. The opposite weight undoes it up to the
    rounding of their dtype. See attach for arguments and errors.
    """
    # An eight-bit kernel becomes an array too: rounding it again would lose the update.
    change = lambda *args: _low_rank(*args, alpha=alpha, weight=weight).array()
    for path, pair in modules(lora, "a"):
        params = replaced(params, path, functools.partial(change, path, pair))
    return params


def replaced(params: dict, path: tuple[str, ...], change) -> dict:
    """`params` with change(kernel) at a module's path; other leaves are shared.

    Raises ValueError if there is no such path.
    """
    return replaced_leaf(params, (*path, "kernel"), change)


def replaced_leaf(params: dict, path: tuple[str, ...], change) -> dict:
    """`params` with change(leaf) at a leaf's path; see `replaced`."""
    # Copies only what lies on the way: a tree of billions of weights stays as it is.
    first, *rest = path
    if not isinstance(params, dict) or first not in params:
        raise ValueError(f"no parameters {first}, only {', '.join(params)}")
    inner = params[first]
    new = replaced_leaf(inner, tuple(rest), change) if rest else change(inner)
    return params | {first: new}


def _low_rank(path, pair, kernel, *, alpha, weight) -> LowRank:
    a, b = pair["a"], pair["b"]
    shape, rank, name = tuple(kernel.shape), a.shape[-1], "/".join(path)
    axes = layout(path, len(shape))
    if axes is None or axes.shapes(shape, rank) != (a.shape, b.shape):
        wanted = "a linear map" if axes is None else axes.shapes(shape, rank)
        raise ValueError(
            f"LoRA {name}: a {a.shape}, b {b.shape} for a kernel {shape}: expected"
            f" {wanted}"
        )
    scale = weight * (alpha / rank if alpha else 1.0)
    return LowRank(kernel, a, b, scale=scale, groups=bool(axes.groups))


def _open(x: Any) -> Any:
    return x.value if isinstance(x, nn.LogicallyPartitioned) else x
