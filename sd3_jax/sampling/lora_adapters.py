"""Loads LoRA files and attaches them to the weights of the components they adapt."""

import functools
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.params import lora
from sd3_jax.sampling import compiled
from sd3_jax.weights import adapter_files, source_names, sources
from sd3_jax.weights import lora_files as files

log = logging.getLogger(__name__)


named = functools.partial(source_names.split_weight, exists=sources.exists)


class Opened(NamedTuple):
    """A LoRA whose header is read: its maps by component, and its weight."""

    path: epath.Path
    weight: float
    layers: dict[str, adapter_files.Layers]


def listed(requested: Any) -> list[tuple[str, float]]:
    """(path or hub name, weight) of one or several: texts and paths, {path: weight}, or
    pairs (path, weight)."""
    if isinstance(requested, Mapping):
        requested = list(requested.items())
    elif isinstance(requested, str | os.PathLike):
        requested = [requested]
    specs = []
    for entry in requested if isinstance(requested, list | tuple) else [requested]:
        # ("a.safetensors", 0.8) is a pair; two paths in a list are two LoRAs, for each
        # of them is a string.
        pair = isinstance(entry, list | tuple) and len(entry) == 2
        path, weight = entry if pair else (entry, None)
        known = isinstance(path, str | os.PathLike)
        if not known or isinstance(weight, bool | str):
            raise UserError(
                f"lora {shown(repr(entry))}: expected a path, (path, weight) or {{path:"
                " weight}"
            )
        text = os.fspath(path)
        specs.append(named(text) if weight is None else (text, float(weight)))
    # NaN or infinity would spread to every activation.
    for path, weight in specs:
        if not math.isfinite(weight):
            raise UserError(f"lora {path}: weight {weight}: expected a finite number")
    return specs


def opened(
    requested: Any, components: Sequence[str], available: Collection[str]
) -> list[Opened]:
    """The requested LoRAs, with no tensor read yet. Maps of other `components` are
    dropped; one for a component that is not `available` is a UserError."""
    loras = []
    # LoRAs add up: each is attached beside the kernels, with its own weight.
    for source, weight in listed(requested):
        path = sources.resolve(source, adapter_files.WANTED, label="LoRA")
        # Headers and kohya's alphas alone: a LoRA for a part that is not there is
        # refused before any weight is loaded.
        layers = {k: x for k, x in adapter_files.read(path).items() if k in components}
        if lacking := [name for name in layers if name not in available]:
            raise UserError(
                f"{path} adapts {lacking[0]}, but the weights have only"
                f" {', '.join(available)}; add a file that has it, after a comma"
            )
        loras.append(Opened(path, weight, layers))
    return loras


def attached(
    variables: Mapping[str, dict], modules: Mapping[str, nn.Module], loras: list[Opened]
) -> dict[str, dict]:
    """Variables by component with the LoRAs beside their kernels, added up."""
    adapted = dict(variables)
    for path, weight, parts in loras:
        for name, layers in parts.items():
            params = adapted[name]["params"]
            lora_params = files.load(layers, name, modules[name], params, weight=weight)
            # The kernel becomes LowRank(base, a, b): the sum is never stored.
            params = lora.attach(params, _placed(lora_params, params))
            adapted[name] = adapted[name] | {"params": params}
            log.info(
                "%s: adapts %d linear layers of %s, times %g",
                path,
                len(layers.updates),
                name,
                weight,
            )
    return adapted


def _placed(lora_params: dict, params: dict) -> dict:
    """a and b, sharded as their kernels along the axes that they share."""
    kernels, placed = lora.kernels(params), {}
    for path, pair in lora.modules(lora_params, "a"):
        kernel = kernels[path]
        # PartitionSpec omits trailing None; the layout needs one entry for each axis.
        mesh, spec = kernel.sharding.mesh, tuple(kernel.sharding.spec)
        spec += (None,) * (kernel.ndim - len(spec))
        # `a` shares the kernel's input axes and `b` its output axes; the rank stays
        # whole.
        specs = lora.layout(path, kernel.ndim).shapes(spec, None)
        placed[path] = {
            name: compiled.put(pair[name], NamedSharding(mesh, PartitionSpec(*axes)))
            for name, axes in zip("ab", specs)
        }
    return lora.nested(placed)
