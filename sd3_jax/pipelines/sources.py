"""What a path or a hub name holds of a released model, by component."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from sd3_jax import tree
from sd3_jax.errors import UserError
from sd3_jax.models.leaves import is_leaf
from sd3_jax.outside import parse_json, shown
from sd3_jax.pipelines import programs
from sd3_jax.weights import names, safetensors, store, stream
from sd3_jax.weights.components import COMPONENTS, CONTROLNET

log = logging.getLogger(__name__)
INDEX = "model_index.json"
# The names without a variant are whole; fp16 ones would come as well.
WANTED = ("*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model", INDEX)
UNWANTED = ("*fp16*", "*.bin")


class Part(NamedTuple):
    """One component as a path holds it: `read(component, module, shapes)` brings it,
    `dtypes(component, module, shapes)` tells how each leaf is stored, by its path."""

    read: Callable
    config: dict
    dtypes: Callable


def resolve(
    source: str, wanted: Sequence[str] = WANTED, *, what: str = "weights"
) -> epath.Path:
    """The path that is meant: as it is, or a hub's repository, downloaded."""
    path = epath.Path(source).expanduser() if source else None
    if path is not None and path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.endswith(".safetensors"):
        raise UserError(f'{what} "{source}": no such file, folder or hub name')
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            source, allow_patterns=list(wanted), ignore_patterns=UNWANTED
        )
    except Exception as error:  # its errors have no common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f'{what} "{source}": no such path, and it cannot be had from the hub:'
            f" {reason}"
        ) from None
    return epath.Path(folder)


def parts(path: epath.Path) -> dict[str, Part]:
    """What a path holds: by component, a function that loads it and its config."""
    if not path.is_dir():
        return _original(path)
    if (path / INDEX).exists():
        return _diffusers(path)
    if (path / store.FILE).exists():
        return _stored(path)
    files = sorted(p for p in path.iterdir() if p.name.endswith(".safetensors"))
    if (path / "config.json").exists():
        return _component_folder(path)
    if len(files) != 1:
        safetensors.refuse_pickles(path)
        raise UserError(
            f"{path}: wanted a diffusers folder ({INDEX}), one of ours ({store.FILE})"
            f" or one .safetensors file; it has {len(files)} of those"
        )
    return _original(files[0])


def _original(path: epath.Path) -> dict[str, Part]:
    tensors, metadata = safetensors.open_file(path)
    known = _json(path, metadata.get("sd3_jax", "{}"))  # what shapes cannot tell
    found = {}
    for name, prefix in _prefixes(tensors, path.name):
        own = {k[len(prefix) :]: x for k, x in tensors.items() if k.startswith(prefix)}
        try:
            told = known.get(name)
            config = told if isinstance(told, dict) else COMPONENTS[name].detect(own)
        except (LookupError, ValueError, ArithmeticError) as error:
            raise UserError(f"{path}: {name} is not whole: {error}") from None
        ours = name in known
        found[name] = _part(own, config, f"{path}: {name}", "original", ours)
    if found and "scheduler" in known:
        found["scheduler"] = Part(None, known["scheduler"], None)
    if not found:
        few = ", ".join(list(tensors)[:3])
        raise UserError(f"{path}: not a model of this family; it holds {few}, …")
    log.info("%s holds %s", path.name, ", ".join(n for n in found if n in COMPONENTS))
    return found


def _prefixes(tensors: safetensors.Tensors, file: str) -> list[tuple[str, str]]:
    """The components in a single file, and what their names there begin with."""
    whole = [
        (n, c.prefix) for n, c in COMPONENTS.items() if c.prefix + c.mark in tensors
    ]
    if whole:
        return whole
    alone = [name for name, c in COMPONENTS.items() if c.mark in tensors]
    if "clip_l" in alone:  # both CLIPs have the same names
        width = tensors[COMPONENTS["clip_l"].mark].shape[0]
        big = width > 1024 or re.search("clip_?g|bigg", file.lower())
        alone.remove("clip_l" if big else "clip_g")
    return [(name, "") for name in alone]


def _diffusers(path: epath.Path) -> dict[str, Part]:
    index = _read(path / INDEX)
    found = {}
    for name, component in COMPONENTS.items():
        folder = path / component.folder
        listed = index.get(component.folder)
        if not isinstance(listed, list) or listed[:1] in ([], [None]):
            continue
        if not (folder / "config.json").exists():
            raise UserError(
                f"{path / INDEX} names {component.folder}, which lacks its config.json"
            )
        found[name] = _from_folder(component, folder)
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        config = _read(scheduler)
        listed = index.get("scheduler")
        if isinstance(listed, list) and listed[1:] and isinstance(listed[1], str):
            config["_class_name"] = listed[1]  # as diffusers, by the index
        found["scheduler"] = Part(None, config, None)
    return found


def _component_folder(path: epath.Path) -> dict[str, Part]:
    config = _read(path / "config.json")
    kind = config.get("_class_name") or config.get("architectures") or ["nothing"]
    kind = str(kind[0] if isinstance(kind, list) else kind)
    size = config.get("hidden_size")
    wide = isinstance(size, int) and size > 1024
    name = {
        "SD3Transformer2DModel": "denoiser",
        "AutoencoderKL": "vae",
        "CLIPTextModelWithProjection": "clip_g" if wide else "clip_l",
        "T5EncoderModel": "t5",
    }.get(kind)
    if name is None:
        raise UserError(f"{path}: config.json is of {shown(kind)}, not known")
    return {name: _from_folder(COMPONENTS[name], path)}


def control(path: epath.Path) -> Part:
    """A ControlNet's folder in diffusers' layout, or its single file in either."""
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"{path}: wanted a ControlNet's folder, with config.json")
        return _from_folder(CONTROLNET, path)
    tensors, _ = safetensors.open_file(path)
    if CONTROLNET.mark not in tensors:
        raise UserError(f"{path}: not a ControlNet of this family")
    fused = any(key.endswith(".attn.qkv.weight") for key in tensors)
    layout = "original" if fused else "diffusers"
    return _part(tensors, CONTROLNET.detect(tensors), str(path), layout)


def _from_folder(component, folder: epath.Path) -> Part:
    config = _read(folder / "config.json")
    config = config.get("text_config", config)  # of a whole CLIP
    return _part(safetensors.open_folder(folder), config, str(folder), "diffusers")


def _part(
    tensors: safetensors.Tensors,
    config: dict,
    what: str,
    layout: str,
    ours: bool = False,
) -> Part:
    def pieces(component, module, shapes):
        table = component.table
        if ours and component.fuller is not None:
            fuller = names.pieces(shapes, component.fuller(module), layout)
            if all(piece.key in tensors for piece in fuller):
                table = component.fuller
        found = names.pieces(shapes, table(module), layout)
        stream.check(tensors, found, what=what, ignored=component.ignored)
        return found

    def read(component, module, shapes):
        return stream.load(tensors, shapes, pieces(component, module, shapes))

    def dtypes(component, module, shapes):
        return stream.dtypes(tensors, pieces(component, module, shapes))

    return Part(read, config, dtypes)


def _stored(path: epath.Path) -> dict[str, Part]:
    def part(name, config):
        return Part(
            lambda component, module, shapes: _from_store(path, name, shapes),
            config,
            lambda component, module, shapes: store.dtypes(path, name),
        )

    return {name: part(name, config) for name, config in store.configs(path).items()}


def _from_store(path: epath.Path, name: str, shapes: Any) -> Any:
    """What is to be in eight bits is read as it is stored, and rounded, a leaf at a
    time."""
    places, treedef = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_leaf)
    made = [store.LEFT if is_leaf(x) else x for _, x in places]
    read = lambda wanted: jax.tree.leaves(
        store.load(path, name, jax.tree.unflatten(treedef, wanted)),
        is_leaf=lambda x: x is store.LEFT,
    )
    made, dtypes = read(made), store.dtypes(path, name)
    for i, (at, x) in enumerate(places):
        if is_leaf(x):
            dtype = jnp.dtype(dtypes[tree.names(at)])
            whole = jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
            alone = [store.LEFT] * len(places)
            alone[i] = whole
            axes = [axis for axis, size in enumerate(x.scale.shape) if size == 1]
            made[i] = programs.quantize(read(alone)[i], type(x), axes)
    return jax.tree.unflatten(treedef, made)


def _read(path: epath.Path) -> dict:
    try:
        return _json(path, path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _json(path, text: str | bytes) -> dict:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object")
    return value
