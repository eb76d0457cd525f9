"""A released model as one thing: modules, their variables, tokenizers, settings."""

import logging
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int, Key

from sd3_jax import tree
from sd3_jax.data import texts, tokenizers
from sd3_jax.errors import UserError, nearest
from sd3_jax.models import quantized
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.outside import shown
from sd3_jax.pipelines import adapters, programs, sources
from sd3_jax.pipelines import scheduler as schedulers
from sd3_jax.pipelines.prompts import Conditioning, TextModels
from sd3_jax.pipelines.scheduler import Scheduler
from sd3_jax.weights import components
from sd3_jax.weights.components import COMPONENTS

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "stored")
QUANTIZED = ("denoiser", "t5")  # what may be in eight bits; the others are small
TEXT = ("clip_l", "clip_g", "t5")


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
        prompts: Sequence[str | Prompt],
        max_sequence_length: int = 256,
        *,
        clip_skip: int = 0,
    ) -> Conditioning:
        """(context (b, 77 + length, 4096), pooled (b, 2048)); absent encoders are 0."""
        if not any(self.text_models):
            raise UserError(f"{self.source} has no text encoder: wanted embeddings")
        ids = self.token_ids(prompts, max_sequence_length)
        sizes = self.configs.get("denoiser", {})
        with programs.on(self.mesh):
            return programs.encode_prompts(
                self.text_models,
                self.text_variables,
                programs.place(ids, self.mesh),
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
        args = programs.place((latents, t, context, pooled), self.mesh)
        with programs.on(self.mesh, args):
            return programs.velocity(module, variables, *args, skip=tuple(skip_layers))

    def encode_image(
        self,
        images: Float[Array | np.ndarray, "b H W 3"],
        key: Key[Array, "*b"] | None = None,
        *,
        shift: float | None = None,
        tile: int | None = None,
    ) -> Float[Array, "b h w c"]:
        """Latents of images in [0, 1]: a draw of the posterior; without key, its mean.

        Of one key all rows are drawn together, of a key for each row each by itself.
        `shift` replaces the autoencoder's own. `tile` pixels square at a time take
        less memory; by design the latents then differ from those of the whole.
        """
        module, variables = self.part("vae"), self.variables["vae"]
        scale = self.latent_scale | ({} if shift is None else {"shift": shift})
        images, key = programs.place((images, key), self.mesh)
        with programs.on(self.mesh, images):
            return programs.encode_image(
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
        latents = programs.place(latents, self.mesh)
        with programs.on(self.mesh, latents):
            return programs.decode(
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
        if not 1 <= length <= 512:
            raise UserError(f"max_sequence_length {length}: wanted 1 to 512")
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
            own = [texts.checked(p.clip_l if p[i] is None else p[i]) for p in full]
            tokenizer = self.tokenizers[name]
            if name == "t5":
                ids["ids_t5"] = tokenizers.t5_ids(tokenizer, own, length, cut)
            else:
                most = self.configs[name]["max_position_embeddings"]
                ids[f"ids_{name}"] = tokenizers.clip_ids(tokenizer, own, most, cut)
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
            "scaling": config.get("scaling_factor", 1.0),
            "shift": config.get("shift_factor") or 0.0,
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

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights as they are here, on any mesh."""
        if "fingerprint" not in self._memo:
            self._memo["fingerprint"] = tree.fingerprint(self.variables)
        return self._memo["fingerprint"]


def load(
    source: str,
    *,
    mesh: Mesh,
    dtype: str = "bfloat16",
    tokenizers_from: str = "",
    only: Sequence[str] = tuple(COMPONENTS),
    lora: Sequence[str] = (),
    quantize: Mapping[str, str] = MappingProxyType({}),
    check: Callable[[Scheduler], None] = lambda scheduler: None,
) -> Bundle:
    """A diffusers folder, an original .safetensors file, our own folder or a hub name.

    Several, with commas between, add up: a transformer's file and those of its text
    encoders. `only` are the components wanted. Single files hold no tokenizers:
    `tokenizers_from` is a folder or hub name that does. The dtype "stored" leaves all
    as it is in the files, for writing it again. Each `lora` is a file of diffusers'
    layout, a folder or a hub name, which "=0.8" at its end weighs; they add up, beside
    the weights (pipelines/adapters.py). `save` writes the sum. `quantize` says whose
    blocks have their matrices in eight bits, {"denoiser": "int8", "t5": "fp8"}: they
    are rounded as they stream in (models/quantized.py). `check` is called with the
    scheduler before any weight is read, and may raise.
    """
    if dtype not in DTYPES:
        raise UserError(
            f'dtype "{dtype}"{nearest(dtype, DTYPES)} (float16 overflows in T5-XXL)'
        )
    quantize = checked_kinds(quantize, dtype)
    paths = [sources.resolve(each.strip()) for each in str(source).split(",")]
    modules, variables, configs, stored, found = {}, {}, {}, {}, {}
    for path in paths:
        for name, part in sources.parts(path).items():
            configs[name] = part.config
            if name in only and part.read is not None:
                found[name] = part
    if lacking := [x for x in quantize if x in only and x not in found]:
        raise UserError(
            f"{source} has no {lacking[0]} to quantize, only {', '.join(found)}"
        )
    where = sources.resolve(tokenizers_from) if tokenizers_from else paths[0]
    words = tokenizers.load(where)
    for name, tokenizer in words.items():
        check_vocabulary(name, len(tokenizer), configs.get(name, {}), where)
    check(_scheduler(configs, source))  # before any weight is read
    for key in schedulers.unread(configs.get("scheduler", {})):
        log.warning('the scheduler of %s: "%s" is not used', source, shown(key))
    compute = jnp.dtype("float32" if dtype == "stored" else dtype)
    for name, part in found.items():
        component = COMPONENTS[name]
        try:
            module = component.build(part.config, compute)
            shapes = components.abstract(component, module, part.config, mesh, compute)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            reason = f"{name} cannot be made from its configuration: {error!r}"
            raise UserError(f"{source}: {reason}") from error
        stored[name] = part.dtypes(component, module, shapes)
        if dtype == "stored":
            shapes = _retyped(shapes, stored[name])
        if name in quantize:
            shapes["params"] = quantized.abstract(shapes["params"], quantize[name])
        modules[name], variables[name] = module, part.read(component, module, shapes)
    variables = adapters.attached(variables, modules, lora, wanted=only)
    if "denoiser" in modules:
        log.info("%s", components.released_name(configs["denoiser"]))
    own = {name: kind for name, kind in quantize.items() if name in modules}
    return Bundle(modules, variables, configs, words, mesh, dtype, source, stored, own)


def _scheduler(configs: Mapping[str, dict], source: str) -> Scheduler:
    return schedulers.read(configs.get("scheduler"), f"the scheduler of {source}")


def checked_kinds(quantize: Mapping[str, str], dtype: str) -> dict[str, str]:
    """Kinds by component, without those that are ""."""
    for name, kind in quantize.items():
        if name not in QUANTIZED:
            raise UserError(f'quantize: "{name}"{nearest(name, QUANTIZED)}')
        if kind and kind not in quantized.KINDS:
            raise UserError(
                f'quantize {name}: "{kind}"{nearest(kind, quantized.KINDS)}'
            )
    kinds = {name: kind for name, kind in quantize.items() if kind}
    if kinds and dtype == "stored":
        raise UserError('quantize: wanted no dtype "stored", which leaves all as it is')
    return kinds


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
    """A ControlNet with its weights and its configuration, which is diffusers'."""

    module: ControlNet
    variables: dict
    config: dict


def load_control(source: str, bundle: Bundle) -> ControlBundle:
    """A diffusers folder, one .safetensors file or a hub name, for this bundle.

    A single-stream net takes the embedding of patches from the bundle's denoiser.
    """
    component, path = components.CONTROLNET, sources.resolve(source)
    part = sources.control(path)
    module = component.build(part.config, jnp.dtype(bundle.dtype))
    denoiser = bundle.part("denoiser")
    if module.width != denoiser.width and module.borrowed:
        raise UserError(
            f"{path}: a ControlNet of width {module.width} for a denoiser of width"
            f" {denoiser.width}: wanted the same"
        )
    shapes = components.abstract(
        component, module, part.config, bundle.mesh, bundle.dtype
    )
    if not module.borrowed:
        return ControlBundle(module, part.read(component, module, shapes), part.config)
    del shapes["buffers"], shapes["params"]["patch_embed"]
    variables = part.read(component, module, shapes)
    theirs = bundle.variables["denoiser"]
    variables["params"]["patch_embed"] = theirs["params"]["patch_embed"]
    if "buffers" in theirs:
        variables["buffers"] = theirs["buffers"]
    return ControlBundle(module, variables, part.config)
