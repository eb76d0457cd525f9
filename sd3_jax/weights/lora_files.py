"""LoRA trees of params/lora.py from adapter files, and to them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import linen as nn

from sd3_jax.errors import UserError
from sd3_jax.params import lora
from sd3_jax.params.adapters import Factors, Full
from sd3_jax.weights import adapter_files, adapter_kinds, adapter_writers
from sd3_jax.weights.adapter_files import Layers


def load(
    layers: Layers, name: str, module: nn.Module, params: Any, *, weight: float = 1.0
) -> dict:
    """The layers of a component as a LoRA (params/lora.py) in host memory, float32.

    b includes alpha and `weight`: attach the LoRA without alpha. `params` may be
    shapes. Raises UserError as adapter_files.leaves, and for an adapter that has more
    than low-rank factors.
    """
    require_lora(layers)
    pairs = {}
    for path, change in adapter_files.leaves(layers, name, module, params):
        if isinstance(change, Full):
            raise UserError(
                f"{layers.path}: changes {'/'.join(path)} in both layouts' names;"
                " expected one"
            )
        b = _scaled(change.b, weight, f"{layers.path}: {'/'.join(path)}")
        pairs[path[:-1]] = {"a": change.a, "b": b}
    return lora.nested(pairs)


def require_lora(layers: Layers) -> None:
    """UserError if an adapter has more than low-rank factors of linear layers."""
    for key, update in layers.updates.items():
        if not set(update.tensors) <= adapter_kinds.LORA:
            raise UserError(
                f"{layers.path}: {key} has {update.name}; expected a LoRA alone,"
                " without biases"
            )


def save(
    path: epath.PathLike,
    loras: Mapping[str, dict],
    parts: Mapping[str, nn.Module],
    *,
    alpha: float = 0.0,
    naming: str = "diffusers",
    dtype: Any = np.float32,
    facts: Mapping[str, str] | None = None,
) -> epath.Path:
    """Write LoRA trees by component, whose modules are `parts`, as one adapter.

    `alpha` is that of attach. See adapter_writers.save for the other arguments.
    """
    adapter = {name: factors(tree, alpha=alpha) for name, tree in loras.items()}
    options = dict(naming=naming, dtype=dtype, facts=facts)
    return adapter_writers.save(path, adapter, parts, **options)


def factors(tree: dict, *, alpha: float = 0.0) -> dict[tuple[str, ...], Factors]:
    """A LoRA tree's pairs by the paths of their kernels, with alpha / rank in b."""
    pairs = {}
    for path, pair in lora.modules(tree, "a"):
        scale = alpha / pair["a"].shape[-1] if alpha else 1.0
        pairs[*path, "kernel"] = Factors(pair["a"], pair["b"] * np.float32(scale))
    return pairs


def _scaled(b: np.ndarray, weight: float, where: str) -> np.ndarray:
    # Reported below with the name of the file, which numpy's warning lacks.
    with np.errstate(over="ignore"):
        scaled = np.float32(weight) * b
    if not np.isfinite(scaled).all():
        raise UserError(
            f"{where}: overflows float32 times {weight:g}; use a smaller weight"
        )
    return scaled
