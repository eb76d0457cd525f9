"""Converts released weights between layouts, or a checkpoint to one of them.

With config.convert.lora_format it writes an adapter alone, in a tool's names.
"""

import logging

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import finetune_start, model_parts
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models import position_table
from sd3_jax.params import parametrization
from sd3_jax.params.adapters import Adapter, Factors, Full
from sd3_jax.sampling import (
    bundle_loading,
    compiled,
    export,
    lora_adapters,
    released_sampler,
)
from sd3_jax.sampling.bundle import Bundle, ControlBundle
from sd3_jax.sampling.scheduler import PUBLISHED
from sd3_jax.weights import adapter_files, adapter_writers, components, sources

log = logging.getLogger(__name__)
OUT = {"diffusers": "diffusers", "original": "model.safetensors", "orbax": "orbax"}
ADAPTER_OUT = {
    "diffusers": "lora_diffusers",
    "peft": "lora_peft",
    "kohya": "lora_kohya.safetensors",
    "comfyui": "lora_comfyui.safetensors",
}


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes config.convert.out, or a path of OUT or ADAPTER_OUT in the workdir."""
    layout, dtype = config.convert.to, config.convert.dtype or None
    naming = config.convert.lora_format
    usual = ADAPTER_OUT[naming] if naming else OUT[layout]
    out = epath.Path(config.convert.out or epath.Path(workdir) / usual)
    # Converting onto existing files would mix two models' shards.
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"config.convert.out = {out} already exists; set a new path")
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        if naming:
            write_adapter(config, epath.Path(workdir), mesh, out)
            return
        # Known by what the file holds, before anything is taken for a model.
        path = epath.Path(config.weights).expanduser()
        if config.weights and path.exists() and sources.is_control(path):
            if config.sample.lora:
                raise UserError(
                    f"config.sample.lora: {path} is a ControlNet, expected a LoRA"
                )
            bundle = bundle_loading.load_stored_control(path, mesh)
        elif config.weights:
            words = config.tokenizers or None  # no prompt will be encoded
            # "stored" keeps each tensor's own dtype, so that a round trip is exact.
            options = dict(dtype="stored", quantize={}, tokenizers_from=words)
            bundle = released_sampler.load(config, mesh, **options)
        else:
            bundle = trained(config, epath.Path(workdir), mesh)
        export.save(bundle, out, layout, dtype=dtype)
    if jax.process_index() == 0:
        control = isinstance(bundle, ControlBundle)
        parts = ["a ControlNet"] if control else bundle.modules
        print(f"{out}: {', '.join(parts)} in the {layout} layout")


def write_adapter(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh, out: epath.Path
) -> None:
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


def trained(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> Bundle:
    """The denoiser of config.sample.step or of the newest checkpoint, as a bundle. Its
    positions, computed here, become a table in the file."""
    parts = model_parts.build_parts(config)
    model = model_parts.mmdit(config.model, "the released layouts hold no other")
    # The published files have a set of weights for image tokens and one for text
    # tokens.
    if model.weight_sets != 2:
        raise UserError(
            f"config.model.weight_sets = {model.weight_sets}: the released layouts"
            " support only 2"
        )
    if model.mlp_ratio != 4:
        raise UserError(
            f"config.model.mlp_ratio = {model.mlp_ratio}: the released layouts support"
            " only 4"
        )
    # exact: float32 masters and not the quantized form that sampling may use.
    params, step = model_parts.trained_params(config, parts, workdir, mesh, exact=True)
    log.info("converting step %d of %s", step, workdir)
    variables = {
        "params": jax.jit(parametrization.arrays)(params["denoiser"])
    }  # with its LoRA
    if "buffers" in params:  # fine-tuned: what else a model has is its base's
        variables["buffers"] = params["buffers"]
        base = finetune_start.base_of(workdir, step)
        bundle = bundle_loading.load(
            base, mesh=mesh, dtype="stored", tokenizers_from=None
        )
        bundle.variables["denoiser"] = variables
        return bundle
    size = model.pos_size
    # Our models compute positions; diffusers' files hold the table itself.
    table = position_table.positions(
        size, size, model.width, size=size, base=model.pos_base
    )
    variables["buffers"] = {"pos_embed": jnp.asarray(table, jnp.float32)[None]}
    config_ = components.denoiser_config(
        model,
        sample_size=parts.shape[0],
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
    )
    # diffusers samples with the shift in this file, so it is the recipe's.
    scheduler = {"shift": config.sample.shift or PUBLISHED.shift}
    return Bundle(
        {"denoiser": model},
        {"denoiser": variables},
        {"denoiser": config_, "scheduler": scheduler},
        {},
        mesh,
        "float32",
        str(workdir),
    )
