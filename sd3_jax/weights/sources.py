"""Open released models: a path or hub name to components and how to load them."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from etils import epath

from sd3_jax import files
from sd3_jax.data import tokenizers
from sd3_jax.errors import UserError, near
from sd3_jax.foreign_text import listed, shown
from sd3_jax.weights import (
    controlnet_keys,
    hub,
    key_mapping,
    native_format,
    safetensors,
    sharded_load,
    single_file,
    source_names,
    stored_forms,
    text_keys,
    tiny_autoencoder_keys,
    unsupported_formats,
)
from sd3_jax.weights.components import COMPONENTS, CONTROLNET, configured
from sd3_jax.weights.model_files import open_file
from sd3_jax.weights.stored_tensor import Tensors

log = logging.getLogger(__name__)
CONFIGS = "sd3_jax"  # metadata: configurations by component, as JSON
FULLER = "sd3_jax_fuller"  # metadata: components written by their fuller tables
UNWANTED = ("*fp16*", "*.bin")  # not fetched from a LoRA's or a CLIP's repository
CLASSES = {  # of config.json and model_index.json, by component
    "denoiser": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "clip_l": "CLIPTextModelWithProjection",
    "clip_g": "CLIPTextModelWithProjection",
    "t5": "T5EncoderModel",
}


TINY = "AutoencoderTiny"  # TAESD, in place of the autoencoder


class Part(NamedTuple):
    """One component at a path.

    `read(component, module, shapes)` loads its variables. `dtypes`, of the same
    arguments, checks the tensors and gives each leaf's stored dtype by path. Both are
    None for a scheduler. `where` is for messages.
    """

    read: Callable | None
    config: dict
    dtypes: Callable | None
    where: str = ""


class Located(NamedTuple):
    """A local or remote path, and the variant that the user named."""

    path: epath.Path
    variant: str = ""


def split(sources: epath.PathLike | Sequence[epath.PathLike]) -> list:
    """The sources in a list or a comma-separated text (source_names.split)."""
    if isinstance(sources, list | tuple):
        paths = (str, os.PathLike)
        return [os.fspath(x) if isinstance(x, paths) else x for x in sources]
    if not isinstance(sources, str | os.PathLike):
        return [sources]  # which `locate` refuses
    return source_names.split(os.fspath(sources), exists)


def exists(path: str) -> bool:
    """Whether a path exists, with ~ expanded."""
    return epath.Path(path).expanduser().exists()


def locate(
    source: str,
    wanted: Sequence[str] | None = None,
    *,
    unwanted: Sequence[str] = (),
    label: str = "weights",
) -> Located:
    """The path and variant that a source names; hub names are downloaded.

    `wanted` and `unwanted` are patterns of files to download. `label` begins messages.
    Raises UserError if there is no such file, folder or hub name.
    """
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise UserError(
            f'{label} "{shown(source)}": expected a file, a folder or a hub name'
        )
    source = os.fspath(source)
    if not source.isprintable() or len(source) > 4096:  # as long as Linux' paths
        raise UserError(f'{label} "{shown(source)}": expected a printable name')
    _check_scheme(source, label)
    # What exists counts before what the hub may have by the same name.
    if existing := _existing(source):
        return existing
    if link := source_names.link(source):
        raise UserError(f'{label} "{source}" is a link; use "{link}"')
    if (name := source_names.parse_absent(source)) is None:
        raise UserError(
            f'{label} "{source}": no such file, folder or hub name{_near(source)}'
        )
    return Located(hub.fetch(name, wanted, unwanted, label), name.variant)


def _existing(source: str) -> Located | None:
    """An existing path, alone or with a variant after a colon; else None."""
    if source.startswith(("hf://", "http://", "https://")):
        return None
    # The whole text first: a folder may have a colon in its name.
    for path, variant in (source, ""), source_names.split_variant(source):
        if exists(path):
            return Located(epath.Path(path).expanduser(), variant)
    return None


def resolve(
    source: str, wanted: Sequence[str] | None = None, *, label: str = "weights"
) -> epath.Path:
    """The path of `locate`; UserError for a variant, where there are none."""
    path, variant = locate(source, wanted, unwanted=UNWANTED, label=label)
    if variant:
        raise UserError(f'{label} "{source}" has no variants; remove ":{variant}"')
    return path


def _check_scheme(source: str, label: str) -> None:
    """UserError for a URL that neither epath nor the hub opens."""
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", source)
    known = source.startswith(source_names.REMOTE) or source_names.link(source)
    if scheme is None or known:
        return
    if scheme[1].lower() in ("http", "https"):
        raise UserError(
            f'{label} "{source}" is a link; download it and name the file, or name a'
            ' model of the hub as "owner/name" or "owner/name/file.safetensors"'
        )
    raise UserError(
        f'{label} "{source}": expected a path, or one that begins with'
        f" {', '.join(source_names.BUCKETS)}"
    )


def _near(source: str) -> str:
    """The end of a message: the name in the folder that was probably meant, or ""."""
    path = epath.Path(source).expanduser()
    if "://" in source or not path.parent.is_dir():
        return ""
    if os.path.islink(path):  # `exists` follows links: this one is broken
        return f": it is a link to {os.readlink(path)}, which does not exist"
    guess = near(path.name, files.names(path.parent))
    return f'; did you mean "{path.parent / guess}"?' if guess else ""


def parts(
    path: epath.Path,
    variant: str = "",
    configs: Mapping[str, dict] = MappingProxyType({}),
) -> dict[str, Part]:
    """The components at a path: a file, or a folder of one of the known forms.

    `configs` are the caller's for components of a file, which has none of its own.
    Raises UserError for a folder of another form, and for unsupported formats.
    """
    # The order matters: a diffusers folder may hold single files beside it.
    if not path.is_dir():
        return _no_variant(path, variant) or _single(path, *open_file(path), configs)
    for file in (hub.INDEX, native_format.FILE, "config.json") if configs else ():
        if (path / file).exists():
            raise UserError(
                f"config: {path} has configurations of its own, {file}; leave config"
                " out, or name a file"
            )
    if (path / hub.INDEX).exists():
        return _diffusers(path, variant)
    if (path / native_format.FILE).exists():
        return _no_variant(path, variant) or _stored(path)
    if (path / "config.json").exists():
        return _component_folder(path, variant)
    names_there = files.names(path)
    weights = [name for name in names_there if name.endswith(".safetensors")]
    # A single file in shards, without the files around it.
    if safetensors.is_sharded(weights):
        return _single(path, safetensors.open_folder(path, variant), {}, configs)
    wanted = (
        f"a diffusers folder ({hub.INDEX}), an sd3_jax folder ({native_format.FILE})"
    )
    ggufs = [name for name in names_there if name.lower().endswith(".gguf")]
    if ggufs and not weights:
        if len(ggufs) > 1:
            raise UserError(f"{path}: holds {listed(ggufs)}; name one of them")
        return _single(path / ggufs[0], *open_file(path / ggufs[0]), configs)
    # The hub's cache of a repository has its files further down.
    cached = "snapshots" in names_there
    hint = f"; name one of {path / 'snapshots'}" if cached else ""
    file = safetensors.only_file(path, wanted, hint)
    return _single(file, *open_file(file), configs)


def _no_variant(path: epath.Path, variant: str) -> None:
    if variant:
        raise UserError(f"{path} has no variants; remove :{variant}")


def _single(
    path,
    tensors: Tensors,
    metadata: Mapping,
    configs: Mapping[str, dict] = MappingProxyType({}),
) -> dict[str, Part]:
    """Components of a single file; `configs` are the caller's, by component."""
    tensors = tiny_autoencoder_keys.with_both_halves(path, tensors)
    # Metadata of a file that we wrote has configurations: shapes cannot tell all.
    known = files.parse_object(path, metadata.get(CONFIGS, "{}"))  # by component
    fuller = _fuller(tensors, metadata, known)
    fuller += [name for name in configs if _projects(name, tensors)]
    known |= configs
    # A CLIP without a prefix is the one that the caller says.
    clip = next((name for name in configs if name in single_file.CLIPS), None)
    components = {}
    for name, part in single_file.split(path, tensors, fuller, clip=clip).items():
        where, component = f"{path}: {name}", COMPONENTS[name]
        config, table = known.get(name), part.table
        if config is not None and name in fuller:
            table = component.fuller
        config = configured(component, config, part.measured, part.layout, where)
        components[name] = _part(part.tensors, config, where, part.layout, table)
    if isinstance(known.get("scheduler"), dict):
        components["scheduler"] = Part(None, known["scheduler"], None, str(path))
    absent = [name for name in COMPONENTS if name not in components]
    none = f"; no {', '.join(absent)}" if absent else ""
    named = ", ".join(name for name in COMPONENTS if name in components)
    log.info("%s holds %s%s", path.name, named, none)
    # A tool dropped a component of a file that we wrote.
    if gone := [name for name in absent if name in known]:
        log.warning("%s: %s, which it lists, no longer exists", path, ", ".join(gone))
    return components


def _fuller(tensors, metadata: Mapping, known: dict) -> list[str]:
    """Components of a file of ours that hold what published ones leave out."""
    # Our earlier files have no such metadata: known by CLIP-L's projection.
    if FULLER in metadata:
        return [name for name in metadata[FULLER].split(",") if name in COMPONENTS]
    more = lambda c: c.fuller is not None and c.prefix + text_keys.PROJECTION in tensors
    return [name for name, c in COMPONENTS.items() if name in known and more(c)]


def _projects(name: str, tensors: Tensors) -> bool:
    """Whether a file has the projection that only a component's fuller table reads."""
    places = (name, text_keys.PROJECTION), ("clip", text_keys.PROJECTION)
    fuller = COMPONENTS[name].fuller is not None
    return fuller and any(single_file.place(key) in places for key in tensors)


def _diffusers(path: epath.Path, variant: str) -> dict[str, Part]:
    """Components of a diffusers folder, as its model_index.json lists them."""
    file = path / hub.INDEX
    entries = _entries(file)
    components, variants = {}, set()
    for name, component in COMPONENTS.items():
        if component.folder not in entries:
            if (path / component.folder).is_dir():
                log.warning("%s does not list %s, which exists", file, component.folder)
            continue
        folder, kind = path / component.folder, entries[component.folder][-1]
        # Another class with the same fields would be another computation.
        if not _is_of(kind, name):
            raise UserError(f"{file}: {component.folder} is {_other(kind, name)}")
        if not (folder / "config.json").exists():
            raise UserError(
                f"{file} names {component.folder}, without a config.json; add it, or"
                " remove the entry if another source has this part"
            )
        variants |= safetensors.variants(folder)
        components[name] = _from_folder(component, folder, variant)
    if "unet" in entries:  # Stable Diffusion 1, 2 or XL
        raise UserError(f"{file} is of a U-Net; expected Stable Diffusion 3 or 3.5")
    # --- report what is listed and not loaded
    known = {"scheduler", *tokenizers.FOLDERS.values()}
    known |= {component.folder for component in COMPONENTS.values()}
    if others := entries.keys() - known:
        log.warning("%s: not loaded: %s", file, ", ".join(sorted(others)))
    if variant and variant not in variants:
        have = listed(sorted(variants - {""})) or "none"
        raise UserError(f"{path}: no weights of the variant {variant}; it has {have}")
    # --- the scheduler, which decides solver and t's unless the user does
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        config = files.read_object(scheduler)
        if "scheduler" in entries:
            # As diffusers does: the index decides, whatever the file says.
            config["_class_name"] = entries["scheduler"][-1]
        components["scheduler"] = Part(None, config, None, str(scheduler))
    return components


def _entries(file: epath.Path) -> dict[str, list]:
    """{folder: [library, class]} of an index; [null, null] is left out on purpose."""
    parts = {component.folder for component in COMPONENTS.values()}
    entries = {}
    for key, value in files.read_object(file).items():
        pair = isinstance(value, list) and len(value) == 2
        if pair and all(isinstance(x, str) for x in value):
            entries[key] = value
        elif key in parts and value not in (None, [None, None]):
            raise UserError(
                f"{file}: {key} {shown(value)}: expected [library, class], or [null,"
                " null] for a part that is left out"
            )
    return entries


def _is_of(kind: str, name: str) -> bool:
    """Whether a class is one of the component's."""
    return kind == CLASSES[name] or (name == "vae" and kind == TINY)


def _other(kind: str, name: str = "") -> str:
    """A description of a class that is not the component's, for a message."""
    wanted = CLASSES[name] if name else ", ".join(dict.fromkeys(CLASSES.values()))
    meaning = unsupported_formats.CLASSES.get(kind)
    return (
        f"{shown(kind)}, {meaning}" if meaning else f"{shown(kind)}: expected {wanted}"
    )


def _component_folder(path: epath.Path, variant: str) -> dict[str, Part]:
    """A folder with the config.json of a single component."""
    config = files.read_object(path / "config.json")
    # diffusers says _class_name, transformers a list of architectures.
    kind = config.get("_class_name") or config.get("architectures") or ["nothing"]
    kind = str(kind[0] if isinstance(kind, list) else kind)
    names = [name for name in CLASSES if _is_of(kind, name)]
    if (path / "checkpoints").is_dir() or {"model", "train"} <= {*config}:
        raise UserError(
            f"{path} is a run of sd3_jax, not released weights: sample it with the job"
            " `sample`, or write its weights with `convert` and load those"
        )
    if not names:
        raise UserError(f"{path}: config.json is of {_other(kind)}")
    if len(names) > 1:  # both CLIPs: by width, or for another width by activation
        usual = "clip_l" if config.get("hidden_act") == "quick_gelu" else "clip_g"
        width = config.get("hidden_size")
        names = [
            single_file.WIDTHS.get(width, usual) if isinstance(width, int) else usual
        ]
    return {names[0]: _from_folder(COMPONENTS[names[0]], path, variant)}


def is_control(path: epath.Path) -> bool:
    """Whether a path holds a ControlNet of SD3 instead of a model."""
    if path.is_dir():
        file = path / "config.json"
        kind = files.read_object(file).get("_class_name") if file.exists() else None
        return kind == "SD3ControlNetModel"
    return CONTROLNET.mark in open_file(path)[0]


def control(path: epath.Path) -> Part:
    """A ControlNet: a diffusers folder, or a single file in either layout."""
    config, layout, file = {}, "diffusers", path
    if path.is_dir() and (path / "config.json").exists():
        config = files.read_object(path / "config.json")
        tensors = safetensors.open_folder(path)
    else:
        if path.is_dir():
            wanted = "a ControlNet's folder (config.json)"
            file = safetensors.only_file(path, wanted)
        tensors, metadata = open_file(file)
        known = files.parse_object(file, metadata.get(CONFIGS, "{}"))
        config = known.get("controlnet") or {}  # of a file that we wrote
        if any(key.endswith(".attn.qkv.weight") for key in tensors):
            layout = "original"  # qkv is fused there alone
    controlnet_keys.require_family(file, tensors, config)
    if config:
        config |= controlnet_keys.hint_channels(tensors, config)
    config = configured(CONTROLNET, config or None, tensors, layout, str(file))
    config |= controlnet_keys.control_type(file, tensors, config)
    return _part(tensors, config, str(file), layout)


def _from_folder(component, folder: epath.Path, variant: str = "") -> Part:
    file = folder / "config.json"
    config, tensors = files.read_object(file), safetensors.open_folder(folder, variant)
    if component.kind == "t5":  # its embedding may have either of two names
        tensors = single_file.with_shared(tensors)
    config = config.get("text_config", config)  # the config.json of a whole CLIP
    config = configured(component, config, tensors, "diffusers", str(file))
    return _part(tensors, config, str(folder), "diffusers")


def _part(
    tensors: Tensors,
    config: dict,
    where: str,
    layout: str,
    table: Callable | None = None,
) -> Part:
    """A Part that loads `tensors`; `table`, if given, replaces the component's."""

    def pieces(component, module, shapes):
        groups = (table or component.table)(module)
        file_pieces = key_mapping.pieces(shapes, groups, layout)
        ignored = component.ignored
        sharded_load.check(tensors, file_pieces, where=where, ignored=ignored)
        return file_pieces

    def read(component, module, shapes):
        file_pieces = pieces(component, module, shapes)
        stored_forms.report(where, tensors, shapes, file_pieces)
        return sharded_load.load(tensors, shapes, file_pieces)

    def dtypes(component, module, shapes):
        return sharded_load.dtypes(tensors, pieces(component, module, shapes))

    return Part(read, config, dtypes, where)


def _stored(path: epath.Path) -> dict[str, Part]:
    """Components of a folder in our own format."""

    def part(name, config):
        return Part(
            lambda component, module, shapes: native_format.load_quantized(
                path, name, shapes
            ),
            config,
            lambda component, module, shapes: native_format.dtypes(path, name),
            str(path),
        )

    configs = native_format.configs(path)
    for name in COMPONENTS.keys() & configs.keys():
        where = f"{path / native_format.FILE}: {name}"
        configs[name] = configured(COMPONENTS[name], configs[name], where=where)
    return {name: part(name, config) for name, config in configs.items()}
