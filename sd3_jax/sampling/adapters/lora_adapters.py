"""Opens adapter files that a caller names, and reads their tensors."""

import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from flax import linen as nn

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.params.adapters import Factors, Full, Path
from sd3_jax.sampling import argument_checks
from sd3_jax.weights import adapter_files, source_names, sources

named = functools.partial(source_names.split_weight, exists=sources.exists)


class Opened(NamedTuple):
    """An adapter whose header is read: its layers by component, and its weight."""

    source: str  # as the caller named it
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
        if not isinstance(path, str | os.PathLike) or isinstance(weight, bool | str):
            raise UserError(
                f"lora {argument_checks.spelled(entry)}: expected a path, (path,"
                " weight) or {path: weight}"
            )
        text = os.fspath(path)
        specs.append(named(text) if weight is None else (text, weight))
    # NaN or infinity would spread to every activation.
    specs = [
        (path, argument_checks.number(f"lora {shown(path)}: weight", weight))
        for path, weight in specs
    ]
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
        loras.append(Opened(source, path, weight, layers))
    return loras


def changes(
    opened: Opened, variables: Mapping[str, dict], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Path, Factors | Full]]:
    """(component, path of the leaf, change) of each leaf, read when it is asked for."""
    for name, layers in opened.layers.items():
        params = variables[name]["params"]
        for path, change in adapter_files.leaves(layers, name, modules[name], params):
            yield name, path, change


def default_name(source: str) -> str:
    """The name of an adapter that the caller gives none: its file's or folder's."""
    last = source.rstrip("/").rpartition("/")[2]
    return last.removesuffix(".safetensors") or source
