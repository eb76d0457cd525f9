"""The miniature SD3.5's components as PyTorch models and as ours, without a bundle."""

import functools
import json
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.torch
import torch
from flax import linen as nn
from parity import convert, miniature

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.params import lora, parametrization
from sd3_jax.params.adapters import Factors
from sd3_jax.weights import adapter_files, components, key_mapping
from sd3_jax.weights.components import COMPONENTS

KIND = "sd35_medium"


class Component(NamedTuple):
    """A component of ours, and its weights by the names of a PyTorch model."""

    name: str
    module: nn.Module
    params: Any
    state: dict[str, torch.Tensor]

    def ours(self, state: dict[str, torch.Tensor]) -> Any:
        """A state dict of the component as our parameters."""
        table = COMPONENTS[self.name].table(self.module)
        return convert.from_torch(shapes_of(self.name), table, state)["params"]

    def loaded(self, path) -> dict:
        """What adapter_files reads for the component, which must be the only one."""
        layers = adapter_files.read(path)
        assert list(layers) == [self.name], list(layers)
        return adapter_files.load(
            layers[self.name], self.name, self.module, self.params
        )

    def merged(self, path, weight: float = 1.0) -> Any:
        """Our parameters with the file's changes added."""
        return added(self.params, self.loaded(path), weight)


def added(params: Any, changes: dict, weight: float = 1.0) -> Any:
    """Parameters with changes of params/adapters.py added."""
    flat = {
        tree.names(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert set(changes) <= set(flat), set(changes) - set(flat)
    for path, change in changes.items():
        if isinstance(change, Factors):
            groups = bool(lora.layout(path[:-1], flat[path].ndim).groups)
            leaf = parametrization.LowRank(
                flat[path], *change, scale=weight, groups=groups
            )
            flat[path] = np.asarray(leaf.array())
        else:
            assert change.delta.shape == flat[path].shape
            flat[path] = flat[path] + weight * change.delta
    return lora.nested(flat)


def error(ours: Any, theirs: Any) -> float:
    """max |ours - theirs| / max |theirs|, the largest of all weights."""
    relative = lambda x, y: float(np.abs(x - y).max() / np.abs(y).max())
    return max(jax.tree.leaves(jax.tree.map(relative, ours, theirs)))


@functools.cache
def configs() -> dict[str, dict]:
    folder = miniature.folder(KIND)
    return {
        name: json.loads((folder / COMPONENTS[name].folder / "config.json").read_text())
        for name in ("denoiser", "clip_l", "clip_g", "t5")
    }


@functools.cache
def component(name: str) -> Component:
    folder = miniature.folder(KIND) / COMPONENTS[name].folder
    (file,) = folder.glob("*.safetensors")
    state = safetensors.torch.load_file(file)
    config = configs()[name]
    module = COMPONENTS[name].build(config, np.float32)
    table = COMPONENTS[name].table(module)
    pieces = key_mapping.pieces(shapes_of(name), table, "diffusers")
    keys = {piece.key for piece in pieces}
    kept = {key: x.float() for key, x in state.items() if key in keys}
    part = Component(name, module, None, kept)
    return part._replace(params=part.ours(kept))


@functools.cache
def shapes_of(name: str) -> Any:
    """The component's variables as shapes."""
    config, part = configs()[name], COMPONENTS[name]
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    module = part.build(config, np.float32)
    return components.abstract(part, module, config, mesh, np.float32)


def save(path, tensors, metadata=None):
    """A file of PyTorch's tensors."""
    contiguous = {key: torch.as_tensor(x).contiguous() for key, x in tensors.items()}
    safetensors.torch.save_file(contiguous, path, metadata=metadata)
    return path


def pieces(name: str, layout: str) -> list:
    """The tensors of a layout for a component's parameters."""
    part = component(name)
    table = COMPONENTS[name].table(part.module)
    every = key_mapping.pieces({"params": part.params}, table, layout)
    return [piece for piece in every if piece.key is not None]


def part(params: Any, piece: Any) -> np.ndarray:
    """The values of a piece of the parameters."""
    for name in piece.path[1:]:
        params = params[name]
    return params[piece.index]
