"""Adapters alone, as `convert` writes them with config.convert.lora_format."""

import logging

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.errors import UserError
from sd3_jax.params import parametrization
from sd3_jax.params.adapters import Adapter, Factors, Full
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.job import released_sampler
from sd3_jax.weights import adapter_files, adapter_writers, sources

log = logging.getLogger(__name__)
OUT = {  # in the workdir, by the tool
    "diffusers": "lora_diffusers",
    "peft": "lora_peft",
    "kohya": "lora_kohya.safetensors",
    "comfyui": "lora_comfyui.safetensors",
}


def write(config: ConfigDict, workdir: epath.Path, mesh: Mesh, out: epath.Path) -> None:
    """Writes the adapter of config.sample.lora, or the LoRA of a run, in the names of
    config.convert.lora_format."""
    if config.weights:
        adapter, modules = opened_adapter(config, mesh)
    else:
        adapter, modules = trained_adapter(config, workdir, mesh)
    naming, dtype = config.convert.lora_format, config.convert.dtype or "float32"
    path = adapter_writers.save(
        out, adapter, modules, naming=naming, dtype=dtype, compact=bool(config.weights)
    )
    if jax.process_index() == 0:
        print(f"{path}: an adapter of {', '.join(adapter)} in the names of {naming}")


def opened_adapter(config: ConfigDict, mesh: Mesh) -> tuple[Adapter, dict]:
    """The only adapter of config.sample.lora, times its weight, and the modules of
    config.weights that it changes. Only their weights are read."""
    adapters = lora_adapters.listed(list(config.sample.lora))
    # Factors of several would have to be concatenated, and no name is left for each.
    if len(adapters) != 1:
        raise UserError(
            f"config.sample.lora names {len(adapters)} adapters; with"
            " config.convert.lora_format it must name one"
        )
    ((source, weight),) = adapters
    path = sources.resolve(source, adapter_files.WANTED, label="LoRA")
    parts = adapter_files.read(path)
    # DoRA's change depends on the base's values, and names on its depth.
    options = dict(only=tuple(parts), dtype="stored", quantize={}, tokenizers_from=None)
    bundle = released_sampler.load(config, mesh, lora=(), **options)
    if lacking := [name for name in parts if name not in bundle.modules]:
        raise UserError(
            f"{path} changes {lacking[0]}, which config.weights = {config.weights} does"
            " not have; add a file that has it, after a comma"
        )
    adapter = {}
    for name, layers in parts.items():
        module, params = bundle.modules[name], bundle.variables[name]["params"]
        changes = adapter_files.leaves(layers, name, module, params)
        adapter[name] = {path: times(change, weight) for path, change in changes}
    return adapter, bundle.modules


def times(change: Factors | Full, weight: float) -> Factors | Full:
    """A change multiplied by a weight."""
    if isinstance(change, Factors):
        # b alone: a times the weight as well would square it.
        return change._replace(b=np.float32(weight) * change.b)
    return Full(np.float32(weight) * change.delta)


def trained_adapter(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh
) -> tuple[Adapter, dict]:
    """The LoRA of config.sample.step or of the newest checkpoint, and its module."""
    parts = model_parts.build_parts(config)
    model = model_parts.mmdit(config.model, "LoRA files hold no other")
    params, step = model_parts.trained_params(config, parts, workdir, mesh, exact=True)
    log.info("writing the LoRA of step %d of %s", step, workdir)
    leaves = jax.tree_util.tree_leaves_with_path(
        params["denoiser"], is_leaf=parametrization.is_leaf
    )
    changes = {
        # alpha / rank moves into b, as everywhere in the common form.
        tree.names(path): Factors(leaf.a, np.float32(leaf.scale) * leaf.b)
        for path, leaf in leaves
        if isinstance(leaf, parametrization.LowRank)
    }
    if not changes:
        raise UserError(
            f"{workdir} trained no LoRA; with config.convert.lora_format, name a file"
            " with --config.sample.lora and its base with --config.weights"
        )
    return {"denoiser": changes}, {"denoiser": model}
