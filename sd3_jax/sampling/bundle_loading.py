"""Files of released weights become a Bundle or a ControlBundle on a mesh."""

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.models.attention import context
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.params import quantization
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling import control as hints
from sd3_jax.sampling import placement as placements
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.bundle import TEXT, Bundle, read_scheduler
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.sampling.schedulers import scheduler_config as schedulers
from sd3_jax.sampling.schedulers.scheduler import Scheduler
from sd3_jax.sampling.text import textual_inversion
from sd3_jax.sampling.text.bundle_tokenizers import fetched_tokenizer, tokenizers_of
from sd3_jax.weights import (
    caller_configs,
    components,
    controlnet_keys,
    hub,
    published_configs,
    sources,
)
from sd3_jax.weights.components import COMPONENTS, CONTROLNET
from sd3_jax.weights.published_configs import fit

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "stored")
# What may be in eight bits, and how; the others are small. T5's activations have
# outliers, which eight bits a token cannot hold.
QUANTIZED = {"denoiser": quantization.KINDS, "t5": quantization.STORED}


def load(
    path_or_hub_name: epath.PathLike | Sequence[epath.PathLike],
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    *,
    tokenizers_from: str | None = "",
    only: str | Collection[str] = tuple(COMPONENTS),
    config: Mapping | epath.PathLike | None = None,
    lora: Any = (),
    embeddings: Any = (),
    quantize: Mapping[str, str] = MappingProxyType({}),
    placement: str = "all",
    context_attention: str = "auto",
    check: Callable[[Scheduler, dict], None] = lambda scheduler, configs: None,
) -> Bundle:
    """Load a released model, sharded over `mesh` (by default all devices).

    `path_or_hub_name` is a diffusers folder, a .safetensors or .gguf file, our own
    folder or a hub name, which may have a revision, a variant or a file:
    "owner/name@v1:fp16", "owner/name/file.safetensors". Quantized files are dequantized
    to `dtype`, or kept in eight bits by `quantize`. Several sources, as a list or
    separated by commas, are combined; of a component in two sources the later one is
    used. The dtype "stored" keeps each tensor's dtype, for saving.

    `only` names the components to load, in our names or those of diffusers' folders,
    such as "denoiser" or "transformer". `config` is the configuration of the one that
    `only` names, for a file whose shapes do not tell all: diffusers' or transformers'
    fields, or a path to them.

    `tokenizers_from` is a folder or hub name with the tokenizers that the sources lack;
    None loads none, for embeddings alone. `lora` names LoRA files or folders of
    diffusers, PEFT or kohya, or on the hub, with weights as in "style.safetensors=0.8"
    or {path: weight}; each is loaded as Bundle.load_adapter does, and `save` writes the
    sum. `embeddings` names files of textual inversion, with another placeholder as in
    "style.safetensors=<style>" or {path: token}; each is loaded as
    Bundle.load_embedding does. `quantize` names components whose blocks have 8-bit
    matrices, {"denoiser": "int8", "t5": "fp8"}; they are rounded while they are read.
    The denoiser's "int8_dynamic" and "fp8_dynamic" multiply eight bits as well
    (params/quantization.py). `context_attention` is how the denoiser's tokens attend
    over the mesh's context axis, "gather", "ring", "ulysses" or "auto"
    (models/attention/context.py).

    With the `placement` "sequential" the weights rest in host memory, and those of a
    component are on the devices only while it runs, so that a model whose largest
    component fits can be sampled (sampling/placement.py). The pictures are those of
    "all". `check(scheduler, configs)` is called before any weight is read, and may
    raise. Raises UserError, which lists tensors that are missing, extra or of another
    shape.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    argument_checks.instance("mesh", mesh, (Mesh,), "distributed.sharding.make_mesh")
    dtype = _checked_dtype(dtype)
    quantize = checked_kinds(quantize, dtype)
    placements.check(placement)
    argument_checks.choice("context_attention", context_attention, context.METHODS)
    for kind in quantize.values():
        quantization.require_units(kind, mesh.devices.flat[0])

    # --- what the sources hold: configurations, and parts whose weights are unread
    names = sources.split(path_or_hub_name)
    if not names:
        raise UserError("no weights; give a file, a folder or a hub name")
    places = [sources.locate(name) for name in names]
    source = ",".join(map(os.fspath, names))
    only = caller_configs.component_names(only)
    callers = {} if config is None else _caller_config(config, only, names)
    parts, configs = _open_parts(places, only, callers)
    # A configuration that no file takes would be ignored in silence.
    if absent := callers.keys() - parts.keys():
        raise UserError(f"{source} has no {', '.join(absent)}, of which config is")
    if lacking := [x for x in quantize if x in only and x not in parts]:
        there = ", ".join(parts)
        raise UserError(f"{source} has no {lacking[0]} to quantize, only {there}")

    # --- checks that need no weights, so that a mistake costs seconds and not minutes
    check(read_scheduler(configs, source), configs)
    for key in schedulers.unread(configs.get("scheduler", {})):
        log.warning('the scheduler of %s: "%s" is not used', source, shown(key))
    fit({name: part.config for name, part in parts.items()}, source)
    if "denoiser" in parts:
        sizes = published_configs.read("denoiser", parts["denoiser"].config)
        heads = sizes["num_attention_heads"]
        sharding.require_context(context_attention, heads, mesh)
    # Headers alone: the layers are matched once the weights are there, since DoRA reads
    # these.
    loras = lora_adapters.opened(lora, only, parts)
    widths = textual_inversion.widths_of(configs, parts)
    learned = [
        vectors
        for path, token in textual_inversion.listed(embeddings)
        for vectors in textual_inversion.opened(path, token, widths)
    ]
    paths = [place.path for place in places]
    words = _tokenizers(paths, tokenizers_from, parts, configs, source)

    # --- the weights, one component after another
    modules, variables, stored = {}, {}, {}
    for name, part in parts.items():
        options = dict(kind=quantize.get(name, ""), placement=placement)
        module, values, dtypes = _read_part(name, part, mesh, dtype, **options)
        modules[name], variables[name], stored[name] = module, values, dtypes
    if "denoiser" in modules:
        log.info("%s", components.released_name(configs["denoiser"]))
        denoiser = modules["denoiser"]
        modules["denoiser"] = denoiser.clone(context_attention=context_attention)
    kinds = {name: kind for name, kind in quantize.items() if name in modules}
    about = dtype, source, stored, kinds
    bundle = Bundle(
        modules, variables, configs, words, mesh, *about, placement=placement
    )
    for opened in loras:
        # One adapter after another, so that host memory holds a leaf of one of them.
        bundle.add_opened(opened)
    return bundle.add_learned(*learned) if learned else bundle


def _tokenizers(
    paths: Sequence,
    tokenizers_from: str | None,
    parts: Mapping[str, sources.Part],
    configs: dict[str, dict],
    source: str,
) -> dict[str, Any]:
    """Tokenizers by encoder; the hub is asked last, and not if embeddings suffice."""
    words = tokenizers_of(paths, tokenizers_from or "", configs)
    if tokenizers_from is not None:
        for name in [x for x in TEXT if x in parts and x not in words]:
            words[name] = fetched_tokenizer(name, configs[name], source)
    return words


def _open_parts(
    places: Sequence, only: Collection[str], callers: Mapping[str, dict]
) -> tuple[dict[str, sources.Part], dict[str, dict]]:
    """The parts named in `only`, unread, and the configurations of all components.

    `callers` are configurations of components whose files have none.
    """
    parts, configs = {}, {}
    for place in places:
        for name, part in sources.parts(*place, callers).items():
            if name in parts:  # of several sources the last one wins
                log.info("%s: used instead of %s", part.where, parts[name].where)
            configs[name] = part.config
            if name in only and part.read is not None:
                parts[name] = part
    return parts, configs


def _caller_config(
    config: Any, only: Sequence[str], names: Sequence
) -> dict[str, dict]:
    """{component: configuration} of the caller's config."""
    if len(set(only)) != 1 or len(names) != 1:
        raise UserError(
            f"config is that of one component of one file, not of {len(set(only))} of"
            f' {len(names)}; name it, such as only={{"transformer"}}'
        )
    return {only[0]: caller_configs.read_config(config, COMPONENTS[only[0]])}


def _read_part(
    name: str, part: sources.Part, mesh: Mesh, dtype: str, *, kind: str, placement: str
) -> tuple[nn.Module, dict, dict]:
    """A component's module, its variables over the mesh, and its dtypes in the file."""
    compute = jnp.dtype("float32" if dtype == "stored" else dtype)
    component = COMPONENTS[name]
    module = component.build(part.config, compute)
    shapes = components.abstract(component, module, part.config, mesh, compute)
    stored = part.dtypes(component, module, shapes)
    if dtype == "stored":
        shapes = _retyped(shapes, stored)
    if kind:
        # Only the abstract tree changes: tensors are rounded as each one is read, so
        # that the full-precision model is never in memory.
        shapes["params"] = quantization.abstract(shapes["params"], kind)
    shapes = placements.at_rest(shapes, placement)
    return module, part.read(component, module, shapes), stored


def _checked_dtype(dtype: Any) -> str:
    try:  # jnp.bfloat16 and the like
        dtype = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    except TypeError:
        dtype = shown(repr(dtype))
    if dtype not in DTYPES:
        raise UserError(
            f'dtype "{dtype}": expected one of {", ".join(DTYPES)} (float16 overflows'
            " in T5-XXL)"
        )
    return dtype


def checked_kinds(quantize: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Kinds by component, without those that are ""."""
    if not isinstance(quantize, Mapping):
        raise UserError(
            f'quantize {shown(repr(quantize))}: expected {{"denoiser": "int8"}}'
        )
    for name, kind in quantize.items():
        if name not in QUANTIZED:
            raise UserError(f'quantize: "{name}"{nearest(name, QUANTIZED)}')
        if kind and kind not in QUANTIZED[name]:
            raise UserError(
                f'quantize {name}: "{kind}"{nearest(kind, QUANTIZED[name])}'
            )
    # "" means "not quantized": recipes list every component.
    kinds = {name: kind for name, kind in quantize.items() if kind}
    if kinds and dtype == "stored":
        raise UserError(
            'quantize cannot be combined with dtype="stored", which keeps all weights'
            " as stored"
        )
    return kinds


def _retyped(shapes, dtypes):
    """The shapes with the dtype that `dtypes` has for each path."""

    def leaf(path, x):
        return jax.ShapeDtypeStruct(
            x.shape, jnp.dtype(dtypes[tree.names(path)]), sharding=x.sharding
        )

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def load_control(path_or_hub_name: epath.PathLike, bundle: Bundle) -> ControlBundle:
    """A diffusers folder, one .safetensors file or a hub name, for this bundle.

    A single-stream net takes the embedding of patches from the bundle's denoiser.
    """
    wanted = ["config.json", *hub.weights(CONTROLNET.stem)]
    path = sources.resolve(path_or_hub_name, wanted, label="ControlNet")
    part = sources.control(path)
    module = CONTROLNET.build(part.config, jnp.dtype(bundle.dtype))
    # Checked before the weights are read: nets of other models fail inside the program.
    denoiser = bundle.part("denoiser")
    hints.require_fit(path, module, part.config, denoiser, bundle.configs["denoiser"])
    if module.borrowed:  # its positions are the denoiser's too
        module = dataclasses.replace(module, pos_size=denoiser.pos_size)
    shapes = _control_shapes(part, module, bundle.mesh, bundle.dtype)
    shapes = placements.at_rest(shapes, bundle.placement)
    variables = part.read(CONTROLNET, module, shapes)
    if module.borrowed:
        # The same arrays, not copies: the embedding takes no memory a second time.
        denoiser_variables = bundle.variables["denoiser"]
        variables["params"]["patch_embed"] = denoiser_variables["params"]["patch_embed"]
        if "buffers" in denoiser_variables:
            variables["buffers"] = denoiser_variables["buffers"]
    # Not before: what a net's files hold does not depend on it.
    method = denoiser.context_attention
    module = dataclasses.replace(module, context_attention=method)
    net = ControlBundle(module, variables, part.config)
    if module.borrowed and controlnet_keys.CONTROL_TYPE not in part.config:
        message = "%s does not define its hints: they are encoded as for blur and depth"
        log.warning(f'{message}; for canny pass ControlInput(preprocess="canny")', path)
    return net


def load_stored_control(path: epath.Path, mesh: Mesh) -> ControlBundle:
    """A ControlNet without a denoiser, in the dtypes of its file, for conversion."""
    part = sources.control(path)
    # The compute dtype does not matter here, for the net is written and never run.
    module = CONTROLNET.build(part.config, jnp.dtype("float32"))
    shapes = _control_shapes(part, module, mesh, "float32")
    shapes = _retyped(shapes, part.dtypes(CONTROLNET, module, shapes))
    return ControlBundle(module, part.read(CONTROLNET, module, shapes), part.config)


def _control_shapes(part: sources.Part, module: ControlNet, mesh: Mesh, dtype: str):
    """Shapes of the tensors that the net's file holds."""
    # A borrowed patch embedding is not in the net's file: it is the denoiser's.
    shapes = components.abstract(CONTROLNET, module, part.config, mesh, dtype)
    return controlnet_keys.without_borrowed(module, shapes)
