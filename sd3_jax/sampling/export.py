"""Saves a bundle: a diffusers folder, an original single file, or our own format."""

import dataclasses
import json
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import tree_leaves_with_path

from sd3_jax import tree
from sd3_jax.data import tokenizers
from sd3_jax.distributed import processes
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import listed
from sd3_jax.params import parametrization
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.sampling.schedulers.scheduler_config import EULER
from sd3_jax.weights import (
    controlnet_keys,
    key_mapping,
    native_format,
    safetensors,
    sharded_load,
    text_keys,
)
from sd3_jax.weights.components import COMPONENTS, CONTROLNET
from sd3_jax.weights.hub import INDEX
from sd3_jax.weights.sources import CONFIGS, FULLER

log = logging.getLogger(__name__)
LAYOUTS = (*key_mapping.LAYOUTS, "orbax")


def save(
    bundle: Bundle | ControlBundle,
    path: epath.PathLike,
    layout: str,
    *,
    dtype: str | None = None,
) -> None:
    """A diffusers folder, an original single file or our own; all processes call it.

    Without `dtype` every tensor gets the dtype of the file that it was loaded from.
    Adapters are merged into the weights; a bundle with embeddings is a UserError. A
    ControlNet keeps its present dtype and its control_type; weights that it borrows
    from the denoiser are left out.

    UserError if the path holds files already, or does not suit the layout.
    """
    argument_checks.instance(
        "bundle", bundle, (Bundle, ControlBundle), "sd3_jax.load or load_control"
    )
    path = epath.Path(path)
    processes.first(lambda: require_new(path, layout))
    if isinstance(bundle, ControlBundle):
        return save_control(bundle, path, layout, dtype=dtype)
    if bundle.embeddings:
        raise UserError(
            f"embeddings {listed(bundle.embeddings)}: no layout of a model has a place"
            " for them; save the bundle to which they were not loaded"
        )
    bundle = bundle.merge_adapters()
    bundle = dataclasses.replace(
        bundle, variables=parametrization.arrays(bundle.variables)
    )
    if layout not in WRITERS:
        raise UserError(f'layout "{layout}"{nearest(layout, LAYOUTS)}')
    WRITERS[layout](bundle, path, dtype)


def require_new(path: epath.Path, layout: str) -> None:
    """UserError for a path that holds files, and for a file without .safetensors."""
    # On existing files the shards of two models would lie side by side.
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path} already exists; give a new path, or an empty folder")
    if layout == "original" and (path.suffix != ".safetensors" or path.is_dir()):
        raise UserError(
            f'{path}: layout "original" is one file; give a path that ends in'
            " .safetensors"
        )


def save_control(
    control: ControlBundle,
    path: epath.Path,
    layout: str,
    *,
    dtype: str | None = None,
) -> None:
    """Writes a ControlNet; control_type is in config.json, which diffusers ignores, or
    in a tensor of the original layout, as in Stability's files."""
    if layout not in key_mapping.LAYOUTS:
        reason = " holds no ControlNet" if layout in LAYOUTS else ""
        raise UserError(
            f'layout "{layout}"{reason}; expected one of'
            f" {', '.join(key_mapping.LAYOUTS)}"
        )
    module, component = control.module, CONTROLNET
    variables = controlnet_keys.without_borrowed(module, control.variables)
    # The tables that loading reads, in the other direction. Stability has published no
    # net of joint blocks: other tools read its single file in diffusers' names.
    names = layout if module.borrowed else "diffusers"
    pieces = key_mapping.pieces(variables, component.table(module), names)
    dtypes = {tree.names(p): x.dtype for p, x in tree_leaves_with_path(variables)}
    entries = sharded_load.entries(variables, pieces, lambda at: dtype or dtypes[at])
    if layout == "diffusers":
        _write(safetensors.write_folder, path, entries, component.stem)
        if jax.process_index() == 0:
            (path / "config.json").write_text(json.dumps(control.config, indent=2))
        return
    if (kind := control.config.get(controlnet_keys.CONTROL_TYPE)) is not None:
        # Stability's files store the kind as a tensor of one integer.
        number = np.array([controlnet_keys.CONTROL_TYPES.index(kind)], np.int32)
        entries[controlnet_keys.CONTROL_TYPE] = safetensors.Entry(
            number.dtype, number.shape, lambda: number
        )
    # A single file has no config.json, and shapes do not tell all of it.
    metadata = {CONFIGS: json.dumps({"controlnet": control.config})}
    _write(safetensors.write_file, path, entries, metadata)


# --- layouts


def _save_orbax(bundle: Bundle, path: epath.Path, dtype: str | None) -> None:
    variables = {}
    for name, arrays in bundle.variables.items():
        dtype_at = _dtype_of(bundle, name, dtype)
        # The default argument binds this iteration's function.
        cast = lambda at, x, dtype_at=dtype_at: x.astype(dtype_at(tree.names(at)))
        variables[name] = jax.tree_util.tree_map_with_path(cast, arrays)
    native_format.save(path, variables, bundle.configs)


def _save_diffusers(bundle: Bundle, path: epath.Path, dtype: str | None) -> None:
    for name in bundle.modules:
        component = COMPONENTS[name]
        entries = _entries(bundle, name, "diffusers", dtype)
        folder = path / component.folder
        _write(safetensors.write_folder, folder, entries, component.stem)
    if jax.process_index() == 0:
        _save_side_files(bundle, path)


def _save_original(bundle: Bundle, path: epath.Path, dtype: str | None) -> None:
    entries = {}
    for name in bundle.modules:
        for key, entry in _entries(bundle, name, "original", dtype).items():
            entries[COMPONENTS[name].prefix + key] = entry
    # The names are in the file's metadata, so that loading it knows which table to use.
    fuller = [name for name in bundle.modules if COMPONENTS[name].fuller]
    for name in fuller:
        _warn_of_unread(bundle, name, path)
    # The configurations go into the metadata: a single file has no config.json.
    metadata = {CONFIGS: json.dumps(bundle.configs), FULLER: ",".join(fuller)}
    _write(safetensors.write_file, path, entries, metadata)


WRITERS = {
    "diffusers": _save_diffusers,
    "original": _save_original,
    "orbax": _save_orbax,
}


# --- tensors of one component


def _dtype_of(bundle: Bundle, name: str, dtype: str | None) -> Callable:
    stored = bundle.file_dtypes.get(name, {})
    return lambda path: jnp.dtype(dtype or stored.get(path, bundle.dtype))


def _entries(bundle: Bundle, name: str, layout: str, dtype: str | None):
    component, variables = COMPONENTS[name], bundle.variables[name]
    table = (layout == "original" and component.fuller) or component.table
    pieces = key_mapping.pieces(variables, table(bundle.modules[name]), layout)
    entries = sharded_load.entries(variables, pieces, _dtype_of(bundle, name, dtype))
    if layout == "original" and component.kind == "t5":
        # T5's embedding under both of its names: Stability's code reads this one alone,
        # ComfyUI and transformers read the other.
        return {text_keys.EMBED_TOKENS: entries[text_keys.SHARED], **entries}
    return entries


def _warn_of_unread(bundle: Bundle, name: str, path: epath.Path) -> None:
    """Warn of weights in a single file that only this package and diffusers apply."""
    component, variables = COMPONENTS[name], bundle.variables[name]
    table = component.table(bundle.modules[name])
    pieces = key_mapping.pieces(variables, table, "original")
    # A piece without a tensor in the published layout usually holds its default.
    unread = [
        "/".join(piece.path[1:])
        for piece in pieces
        if piece.key is None
        and not np.array_equal(sharded_load.part(variables, piece), piece.fill())
    ]
    if unread:
        message = "%s: %s's %s is not the identity; ComfyUI and Stability's code do not"
        message += " apply it, so that their pictures differ from diffusers'"
        log.warning(message, path, name, ", ".join(unread))


def _write(write: Callable, path: epath.Path, entries: dict, *rest) -> None:
    """Process 0 writes; the others take part in gathering each tensor."""
    if jax.process_index() == 0:
        write(path, entries, *rest)
    else:
        # Reading a sharded tensor is a collective: every process must call it, in one
        # order.
        for entry in entries.values():
            entry.data()


def _save_side_files(bundle: Bundle, path: epath.Path) -> None:
    # diffusers reads model_index.json to find the class of each folder; [None, None]
    # marks a component that the pipeline does without.
    index = {"_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.32.0"}
    scheduler = {"_class_name": EULER, "shift": bundle.scheduler.shift}
    scheduler |= bundle.configs.get("scheduler", {})  # as it came, whatever we do of it
    # diffusers' pipelines require a scheduler, so one is written for every bundle.
    folders = {"scheduler/scheduler_config.json": scheduler}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    for name, component in COMPONENTS.items():
        kind = [None, None]
        if name in bundle.modules:
            config = bundle.configs[name]
            folders[f"{component.folder}/config.json"] = config
            if "_class_name" in config:
                kind = ["diffusers", config["_class_name"]]
            else:
                kind = ["transformers", config["architectures"][0]]
        index[component.folder] = kind
    index |= tokenizers.save(bundle.tokenizers, path)
    for file, value in (*folders.items(), (INDEX, index)):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text(json.dumps(value, indent=2))
