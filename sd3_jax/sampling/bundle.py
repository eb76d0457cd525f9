"""A released model as one thing: modules, their variables, tokenizers, settings."""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Key

from sd3_jax import tree
from sd3_jax.data import prompt_text, tokenizers
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.params import quantization
from sd3_jax.sampling import argument_checks, compiled, lora_adapters
from sd3_jax.sampling import control as hints
from sd3_jax.sampling import input_images as inputs
from sd3_jax.sampling import scheduler_config as schedulers
from sd3_jax.sampling.input_images import Pictures
from sd3_jax.sampling.prompts import Conditioning, TextModels
from sd3_jax.sampling.scheduler_config import Scheduler
from sd3_jax.weights import components, controlnet_keys, hub, sources
from sd3_jax.weights.components import COMPONENTS, CONTROLNET
from sd3_jax.weights.published_configs import fit

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "stored")
QUANTIZED = ("denoiser", "t5")  # what may be in eight bits; the others are small
TEXT = ("clip_l", "clip_g", "t5")
CLIPS = TEXT[:2]


class Prompt(NamedTuple):
    """A prompt of its own for each encoder; what is None is as the first."""

    clip_l: str
    clip_g: str | None = None
    t5: str | None = None


@dataclass(frozen=True, repr=False)
class Bundle:
    """Everything by component: "denoiser", "vae", "clip_l", "clip_g" and "t5".

    `configs` are those of diffusers and transformers, "scheduler" is one of them;
    `variables` are linen's, of `dtype`, sharded over `mesh`. What a file lacks is in
    none of the dictionaries: a text encoder left out is zeros to the denoiser.
    """

    modules: dict[str, nn.Module]
    variables: dict[str, dict]
    configs: dict[str, dict]
    tokenizers: dict[str, Any]
    mesh: Mesh
    dtype: str
    source: str = ""
    file_dtypes: dict[str, dict] = field(default_factory=dict)  # of leaves, by path
    quantize: dict[str, str] = field(default_factory=dict)  # "int8", by component
    _memo: dict = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        config = self.configs.get("denoiser")
        name = "" if config is None else components.released_name(config) + "; "
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        kind = lambda part: f" {self.quantize[part]}" if part in self.quantize else ""
        parts = ", ".join(part + kind(part) for part in self.modules)
        return f"Bundle({name}{parts}; {self.dtype}; mesh {mesh}; {self.source})"

    def encode_prompts(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        max_sequence_length: int = 256,
        *,
        clip_skip: int = 0,
    ) -> Conditioning:
        """(context (b, 77 + length, 4096), pooled (b, 2048)); absent encoders are 0.

        One text alone is a batch of one.
        """
        prompts = [prompts] if isinstance(prompts, str | Prompt) else prompts
        argument_checks.whole("clip_skip", clip_skip, 0, most_clip_skip(self.configs))
        if not any(self.text_models):
            raise UserError(f"{self.source} has no text encoder: wanted embeddings")
        ids = self.token_ids(prompts, max_sequence_length)
        sizes = self.configs.get("denoiser", {})
        with compiled.on(self.mesh):
            return compiled.encode_prompts(
                self.text_models,
                self.text_variables,
                compiled.place(ids, self.mesh),
                clip_skip=clip_skip,
                context_dim=sizes.get("joint_attention_dim", 4096),
                pooled_dim=sizes.get("pooled_projection_dim", 2048),
                length=max_sequence_length,
            )

    def velocity(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        t: Float[Array | np.ndarray, " b"],
        context: Float[Array | np.ndarray, "b l k"],
        pooled: Float[Array | np.ndarray, "b e"],
        *,
        skip_layers: Sequence[int] = (),
    ) -> Float[Array, "b h w c"]:
        """v = noise - x0 at time t, 1 being noise."""
        module, variables = self.part("denoiser"), self.variables["denoiser"]
        latents = inputs.laid_out(latents, module.channels)
        t = inputs.times(t, len(latents))
        rows = {len(latents), len(context), len(pooled)}
        if len(rows) > 1:
            raise UserError(
                f"{len(latents)} latents, {len(context)} rows of context and"
                f" {len(pooled)} of pooled: wanted as many of each"
            )
        last = module.depth - 1
        skipped = argument_checks.whole_numbers("skip_layers", skip_layers, 0, last)
        args = compiled.place((latents, t, context, pooled), self.mesh)
        with compiled.on(self.mesh, args):
            return compiled.velocity(module, variables, *args, skip=tuple(skipped))

    def encode_image(
        self,
        images: Pictures,
        key: Key[Array, "*b"] | None = None,
        *,
        shift: float | None = None,
        tile: int | None = None,
        preprocess: str = "plain",
    ) -> Float[Array, "b h w c"]:
        """Latents of images: a draw of the posterior; without key, its mean.

        Images are floats in [0, 1], bytes or PIL images, (b, H, W, 3) or one alone
        (pipelines/images.py). Of one key all rows are drawn together, of a key for each
        row each by itself. `shift` replaces the autoencoder's own. `tile` pixels square
        at a time take less memory; by design the latents then differ from those of the
        whole. `preprocess` is that of a ControlNet's hint (pipelines/control.py).
        """
        module, variables = self.part("vae"), self.variables["vae"]
        scale = self.latent_scale | ({} if shift is None else {"shift": shift})
        images = inputs.pixels(images)
        images = hints.prepare(images, preprocess)
        images, key = compiled.place((images, key), self.mesh)
        with compiled.on(self.mesh, images):
            return compiled.encode_image(
                module, variables, images, key, **scale, tile=tile
            )

    def decode(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        *,
        tile: int | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Latents to images in [0, 1].

        `tile` pixels square at a time, for large images: it takes less memory, and by
        design the images differ from those decoded whole.
        """
        module, variables = self.part("vae"), self.variables["vae"]
        latents = inputs.laid_out(latents, module.latent_channels)
        latents = compiled.place(latents, self.mesh)
        with compiled.on(self.mesh, latents):
            return compiled.decode(
                module, variables, latents, **self.latent_scale, tile=tile
            )

    def token_ids(
        self,
        prompts: Sequence[str | Prompt],
        length: int,
        *,
        encoders: Container[str] | None = None,
        cut: Counter[str] | None = None,
    ) -> dict[str, Int[np.ndarray, "b _"]]:
        """What encode_prompts reads, by encoder: "ids_clip_l" and so on.

        Of the `encoders` named, whose weights need not be here; by default those here.
        What they do not read to its end is told of, or with `cut` counted, by encoder.
        """
        encoders = self.modules if encoders is None else encoders
        argument_checks.whole("max_sequence_length", length, 1, 512)
        full = [p if isinstance(p, Prompt) else Prompt(p) for p in prompts]
        ids = {}
        for i, name in enumerate(TEXT):
            if name not in encoders:
                continue
            if name not in self.tokenizers:
                raise UserError(
                    f"{self.source} has no tokenizer for {name}: wanted"
                    " tokenizers_from=FOLDER, a diffusers folder or a hub name"
                )
            texts = [
                prompt_text.checked(p.clip_l if p[i] is None else p[i]) for p in full
            ]
            tokenizer = self.tokenizers[name]
            if name == "t5":
                ids["ids_t5"] = tokenizers.t5_ids(tokenizer, texts, length, cut)
            else:
                most = self.configs[name]["max_position_embeddings"]
                ids[f"ids_{name}"] = tokenizers.clip_ids(tokenizer, texts, most, cut)
        return ids

    @property
    def text_models(self) -> TextModels:
        return TextModels(*(self.modules.get(name) for name in TEXT))

    @property
    def text_variables(self) -> dict[str, dict | None]:
        return {name: self.variables.get(name) for name in TEXT}

    @property
    def scheduler(self) -> Scheduler:
        """What the model is sampled with unless the caller says otherwise."""
        return _scheduler(self.configs, self.source)

    @property
    def latent_scale(self) -> dict[str, float]:
        """What takes the autoencoder's latents to the denoiser's."""
        config = self.configs["vae"]
        return {
            "scaling": config["scaling_factor"],
            "shift": config["shift_factor"] or 0.0,
        }

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return 2 ** (len(self.part("vae").channels) - 1) if "vae" in self.modules else 8

    def part(self, name: str) -> nn.Module:
        if name not in self.modules:
            raise UserError(
                f"{self.source or 'the bundle'} has no {name}, only"
                f" {', '.join(self.modules)}; name a file that has one after a comma"
            )
        return self.modules[name]

    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` of each part by itself."""
        if "fingerprints" not in self._memo:
            prints = {k: tree.fingerprint(x) for k, x in self.variables.items()}
            self._memo["fingerprints"] = prints
        return self._memo["fingerprints"]

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights as they are here, on any mesh."""
        if "fingerprint" not in self._memo:
            self._memo["fingerprint"] = tree.fingerprint(self.variables)
        return self._memo["fingerprint"]


def load(
    source: epath.PathLike | Sequence[epath.PathLike],
    *,
    mesh: Mesh,
    dtype: str = "bfloat16",
    tokenizers_from: str | None = "",
    only: Sequence[str] = tuple(COMPONENTS),
    lora: Any = (),
    quantize: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[Scheduler, dict], None] = lambda scheduler, configs: None,
) -> Bundle:
    """A diffusers folder, a .safetensors file, our own folder or a hub name.

    A hub name may have a revision, a variant or a file: "owner/name@v1:fp16",
    "owner/name/file.safetensors". Several sources, a list or with commas between, add
    up: a transformer's file and those of its text encoders; of two that have the same
    component the later one's is taken. `only` are the components wanted. The dtype
    "stored" leaves all as it is in the files, for writing it again.

    `tokenizers_from` is a folder or hub name that has the tokenizers which `source`
    lacks; None goes without, for embeddings alone. Each `lora` is a file of diffusers'
    layout, a folder or a hub name, which "=0.8" at its end weighs; they add up, beside
    the weights (pipelines/adapters.py). `save` writes the sum. `quantize` says whose
    blocks have their matrices in eight bits, {"denoiser": "int8", "t5": "fp8"}: they
    are rounded as they stream in (models/quantized.py). `check` is called with
    scheduler and configs before any weight is read, and may raise.
    """
    dtype = dtype if isinstance(dtype, str) else _dtype_name(dtype)
    if dtype not in DTYPES:
        raise UserError(
            f'dtype "{dtype}"{nearest(dtype, DTYPES)} (float16 overflows in T5-XXL)'
        )
    quantize = checked_kinds(quantize, dtype)
    names = sources.split(source)
    if not names:
        raise UserError("no weights: wanted a file, a folder or a hub name")
    places = [sources.locate(name) for name in names]
    source = ",".join(map(os.fspath, names))
    modules, variables, configs, stored, parts = {}, {}, {}, {}, {}
    for place in places:
        for name, part in sources.parts(*place).items():
            if name in parts:
                log.info("%s: in the place of %s", part.where, parts[name].where)
            configs[name] = part.config
            if name in only and part.read is not None:
                parts[name] = part
    if lacking := [x for x in quantize if x in only and x not in parts]:
        raise UserError(
            f"{source} has no {lacking[0]} to quantize, only {', '.join(parts)}"
        )
    check(_scheduler(configs, source), configs)  # before any weight is read
    for key in schedulers.unread(configs.get("scheduler", {})):
        log.warning('the scheduler of %s: "%s" is not used', source, shown(key))
    fit({name: part.config for name, part in parts.items()}, source)
    loras = lora_adapters.opened(lora, only, parts)
    paths = [place.path for place in places]
    words = tokenizers_of(paths, tokenizers_from or "", configs)
    if tokenizers_from is not None:
        for name in [x for x in TEXT if x in parts and x not in words]:
            words[name] = fetched_tokenizer(name, configs[name], source)
    compute = jnp.dtype("float32" if dtype == "stored" else dtype)
    for name, part in parts.items():
        component = COMPONENTS[name]
        module = component.build(part.config, compute)
        shapes = components.abstract(component, module, part.config, mesh, compute)
        stored[name] = part.dtypes(component, module, shapes)
        if dtype == "stored":
            shapes = _retyped(shapes, stored[name])
        if name in quantize:
            shapes["params"] = quantization.abstract(shapes["params"], quantize[name])
        modules[name], variables[name] = module, part.read(component, module, shapes)
    variables = lora_adapters.attached(variables, modules, loras)
    if "denoiser" in modules:
        log.info("%s", components.released_name(configs["denoiser"]))
    quantized = {name: kind for name, kind in quantize.items() if name in modules}
    return Bundle(
        modules, variables, configs, words, mesh, dtype, source, stored, quantized
    )


def most_clip_skip(configs: Mapping[str, dict]) -> int:
    """The last layers of a CLIP that may be left out; it reads the last but one."""
    depths = [configs[name]["num_hidden_layers"] for name in CLIPS if name in configs]
    return max(min(depths, default=2) - 2, 0)


def _dtype_name(dtype: Any) -> str:
    """Of jnp.bfloat16 and the like."""
    try:
        return jnp.dtype(dtype).name
    except TypeError:
        return shown(repr(dtype))


def _scheduler(configs: Mapping[str, dict], source: str) -> Scheduler:
    return schedulers.read(configs.get("scheduler"), f"the scheduler of {source}")


def checked_kinds(quantize: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Kinds by component, without those that are ""."""
    if not isinstance(quantize, Mapping):
        raise UserError(
            f'quantize {shown(repr(quantize))}: wanted {{"denoiser": "int8"}}'
        )
    for name, kind in quantize.items():
        if name not in QUANTIZED:
            raise UserError(f'quantize: "{name}"{nearest(name, QUANTIZED)}')
        if kind and kind not in quantization.KINDS:
            raise UserError(
                f'quantize {name}: "{kind}"{nearest(kind, quantization.KINDS)}'
            )
    kinds = {name: kind for name, kind in quantize.items() if kind}
    if kinds and dtype == "stored":
        raise UserError('quantize: wanted no dtype "stored", which leaves all as it is')
    return kinds


def tokenizers_of(paths: Sequence, other: str, configs: dict) -> dict[str, Any]:
    """Those in a model's folders, or in the `other` place, and for what is CLIP's the
    package's own; each is of its encoder's vocabulary."""
    if other:
        paths = [sources.resolve(other, tokenizers.WANTED, what="tokenizers")]
    words = {}
    for path in paths:
        folder_tokenizers = tokenizers.load(path)
        if other and not folder_tokenizers:
            raise UserError(
                f"{path}: no tokenizers: wanted a diffusers folder, which has them in"
                f" {', '.join(tokenizers.FOLDERS.values())}, or T5's own"
            )
        for name in [name for name in folder_tokenizers if name not in words]:
            check_vocabulary(
                name, len(folder_tokenizers[name]), configs.get(name, {}), path
            )
            words[name] = folder_tokenizers[name]
    for name in CLIPS:
        size = configs.get(name, {}).get("vocab_size")
        if name not in words and size == tokenizers.CLIP_WORDS:
            words[name] = tokenizers.packaged_clip(name)
    return words


def fetched_tokenizer(name: str, config: dict, source: str) -> Any:
    """T5's from the hub; a UserError that says what to give, where that cannot be."""
    remedy = (
        "wanted tokenizers_from=FOLDER (config.tokenizers), a diffusers folder or a hub"
        " name, or None for embeddings alone"
    )
    rows = config["vocab_size"]
    if name != "t5" or rows != tokenizers.T5_WORDS:
        raise UserError(
            f"{source}: no tokenizer for {name}, whose {rows} rows are not those of the"
            f" published encoder: {remedy}"
        )
    try:
        folder = sources.resolve(
            tokenizers.T5_HUB, tokenizers.WANTED, what="tokenizers"
        )
        tokenizer = tokenizers.read("t5", folder)
    except UserError as error:
        raise UserError(f"{source}: no tokenizer for t5 ({error}): {remedy}") from None
    check_vocabulary(name, len(tokenizer), config, folder)
    return tokenizer


def check_vocabulary(name: str, tokens: int, config: dict, where: Any) -> None:
    """A tokenizer's size against its encoder's: ids of another model are other words,
    and beyond the embedding's rows NaN."""
    rows = config.get("vocab_size")
    spare = 128 if name == "t5" else 0  # rows that its embedding has without a word
    if isinstance(rows, int) and not rows - spare <= tokens <= rows:
        raise UserError(
            f"{where}: its tokenizer for {name} has {tokens} tokens, the encoder {rows}"
            " rows: wanted the tokenizer of the same model (config.tokenizers)"
        )


def _retyped(shapes, dtypes):
    """The shapes with the dtypes that their paths have."""

    def leaf(path, x):
        return jax.ShapeDtypeStruct(
            x.shape, jnp.dtype(dtypes[tree.names(path)]), sharding=x.sharding
        )

    return jax.tree_util.tree_map_with_path(leaf, shapes)


class ControlBundle(NamedTuple):
    """A ControlNet with its weights and its configuration, which is diffusers'.

    config["control_type"], "blur", "canny" or "depth", is there if its file says so.
    """

    module: ControlNet
    variables: dict
    config: dict

    def __repr__(self) -> str:
        kind = self.config.get(
            controlnet_keys.CONTROL_TYPE, "its hint's kind is not said"
        )
        return f"ControlBundle(depth {self.module.depth}, {kind})"


def load_control(source: epath.PathLike, bundle: Bundle) -> ControlBundle:
    """A diffusers folder, one .safetensors file or a hub name, for this bundle.

    A single-stream net takes the embedding of patches from the bundle's denoiser.
    """
    path = resolve_control(source)
    part = sources.control(path)
    module = CONTROLNET.build(part.config, jnp.dtype(bundle.dtype))
    denoiser = bundle.part("denoiser")
    hints.require_fit(path, module, part.config, denoiser, bundle.configs["denoiser"])
    if module.borrowed:  # its positions are the denoiser's too
        module = dataclasses.replace(module, pos_size=denoiser.pos_size)
    shapes = _control_shapes(part, module, bundle.mesh, bundle.dtype)
    variables = part.read(CONTROLNET, module, shapes)
    if module.borrowed:
        denoiser_variables = bundle.variables["denoiser"]
        variables["params"]["patch_embed"] = denoiser_variables["params"]["patch_embed"]
        if "buffers" in denoiser_variables:
            variables["buffers"] = denoiser_variables["buffers"]
    net = ControlBundle(module, variables, part.config)
    if module.borrowed and controlnet_keys.CONTROL_TYPE not in part.config:
        message = (
            "%s does not say what its hints are: they are encoded as blur and depth"
        )
        log.warning(f'{message}; of canny write ControlInput(preprocess="canny")', path)
    return net


def load_stored_control(path: epath.Path, mesh: Mesh) -> ControlBundle:
    """A ControlNet without a denoiser, as it is in its file, for writing it again."""
    part = sources.control(path)
    module = CONTROLNET.build(part.config, jnp.dtype("float32"))
    shapes = _control_shapes(part, module, mesh, "float32")
    shapes = _retyped(shapes, part.dtypes(CONTROLNET, module, shapes))
    return ControlBundle(module, part.read(CONTROLNET, module, shapes), part.config)


def resolve_control(source: str) -> epath.Path:
    wanted = ["config.json", *hub.weights(CONTROLNET.stem)]
    return sources.resolve(source, wanted, what="ControlNet")


def _control_shapes(part: sources.Part, module: ControlNet, mesh: Mesh, dtype: str):
    """Of what its file holds."""
    shapes = components.abstract(CONTROLNET, module, part.config, mesh, dtype)
    return controlnet_keys.without_borrowed(module, shapes)
