"""A released model as one object: modules, variables, tokenizers, configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Key

from sd3_jax import tree
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.sampling import argument_checks, compiled, weighted_prompts
from sd3_jax.sampling import input_images as inputs
from sd3_jax.sampling import scheduler_config as schedulers
from sd3_jax.sampling.adapter_bank import Bank, Sets
from sd3_jax.sampling.bundle_adapters import WithAdapters
from sd3_jax.sampling.bundle_prompts import WithPrompts
from sd3_jax.sampling.control import PREPROCESS
from sd3_jax.sampling.input_images import Pictures
from sd3_jax.sampling.prompt_tokens import TEXT, Prompt
from sd3_jax.sampling.prompts import Conditioning, TextModels
from sd3_jax.sampling.scheduler import Scheduler
from sd3_jax.weights import components, controlnet_keys

CLIPS = TEXT[:2]


@dataclass(frozen=True, repr=False)
class Bundle(WithPrompts, WithAdapters):
    """Everything by component: "denoiser", "vae", "clip_l", "clip_g" and "t5".

    `configs` are those of diffusers and transformers and include "scheduler";
    `variables` are linen's, in `dtype`, sharded over `mesh`. A component that the files
    lack has no entry: the denoiser reads zeros in place of a text encoder. Adapters
    stay beside the variables, in `bank`.
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
    bank: Bank = field(default_factory=Bank, compare=False)
    # The dataclass is frozen; fingerprints read all weights, so they are kept here.
    _memo: dict = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        config = self.configs.get("denoiser")
        name = "" if config is None else components.released_name(config) + "; "
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        kind = lambda part: f" {self.quantize[part]}" if part in self.quantize else ""
        parts = ", ".join(part + kind(part) for part in self.modules)
        added = "".join(f"; adapter {shown(k)} {v:g}" for k, v in self.adapters.items())
        about = f"{self.dtype}; mesh {mesh}; {self.source}{added}"
        return f"Bundle({name}{parts}; {about})"

    def encode_prompts(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        max_sequence_length: int = 256,
        *,
        clip_skip: int = 0,
        adapters: Sets | None = None,
        weighting: str | None = None,
    ) -> Conditioning:
        """(context (b, 77 + length, 4096), pooled (b, 2048)); absent encoders are 0.

        One text is a batch of one. `adapters` are weights by name, or a set a prompt.
        With `weighting`, "parentheses" or "compel", prompts may weigh their words
        (data/prompt_weights.py); another program then encodes those that do.
        """
        # A Prompt is a tuple of texts and one prompt; a list is a batch.
        prompts = [prompts] if isinstance(prompts, str | Prompt) else prompts
        argument_checks.whole("clip_skip", clip_skip, 0, most_clip_skip(self.configs))
        if not any(self.text_models):
            raise UserError(
                f"{self.source} has no text encoder; pass embeddings instead of texts"
            )
        table = self.bank.table(adapters, len(prompts))
        tokens = self._tokens(prompts, max_sequence_length, weighting=weighting)
        self._log_cuts(tokens)
        models = self.text_models
        variables = {name: self.adapted(name, table) for name in self.text_variables}
        # A bundle of text encoders alone encodes for the published models' widths.
        sizes = self.configs.get("denoiser", {})
        options = dict(
            clip_skip=clip_skip,
            context_dim=sizes.get("joint_attention_dim", 4096),
            pooled_dim=sizes.get("pooled_projection_dim", 2048),
            length=max_sequence_length,
        )
        place = lambda x: compiled.place(x, self.mesh)
        with compiled.on(self.mesh):
            if weighting is None or not tokens.is_weighted:
                return compiled.encode_prompts(
                    models, variables, place(tokens.ids), **options
                )
            empty = self._tokens([""] * len(prompts), max_sequence_length)
            words = tokens.words, empty.words
            return weighted_prompts.encode(
                models, variables, *words, weighting, place=place, **options
            )

    def velocity(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        t: Float[Array | np.ndarray, " b"],
        context: Float[Array | np.ndarray, "b l k"],
        pooled: Float[Array | np.ndarray, "b e"],
        *,
        skip_layers: Sequence[int] = (),
        adapters: Sets | None = None,
    ) -> Float[Array, "b h w c"]:
        """v = noise - x0 at time t, 1 being noise; `adapters` are as in generate."""
        module = self.part("denoiser")
        latents = inputs.laid_out(latents, module.channels)
        t = inputs.times(t, len(latents))
        # Checked here: in the program unequal rows would broadcast or fail obscurely.
        rows = {len(latents), len(context), len(pooled)}
        if len(rows) > 1:
            raise UserError(
                f"{len(latents)} latents, {len(context)} rows of context and"
                f" {len(pooled)} of pooled: the numbers must be equal"
            )
        skipped = argument_checks.skip_layers(skip_layers, module.depth)
        table = self.bank.table(adapters, len(latents), "latents")
        variables = self.adapted("denoiser", table)
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
        (sampling/input_images.py). One key draws all rows together, a key for each row
        draws them independently. `shift` replaces the autoencoder's. With `tile`,
        square tiles of that many pixels are encoded one by one, which takes less memory
        and gives slightly other latents. `preprocess` is that of a ControlNet's hint
        (sampling/control.py).
        """
        module, variables = self.part("vae"), self.variables["vae"]
        # Some ControlNets were trained on hints without the autoencoder's shift.
        scale = self.latent_scale | ({} if shift is None else {"shift": shift})
        argument_checks.choice("preprocess", preprocess, PREPROCESS)
        images = PREPROCESS[preprocess](inputs.pixels(images))
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

        With `tile`, square tiles of that many pixels are decoded one by one, which
        takes less memory and gives slightly other images.
        """
        module, variables = self.part("vae"), self.variables["vae"]
        latents = inputs.laid_out(latents, module.latent_channels)
        latents = compiled.place(latents, self.mesh)
        with compiled.on(self.mesh, latents):
            return compiled.decode(
                module, variables, latents, **self.latent_scale, tile=tile
            )

    @property
    def text_models(self) -> TextModels:
        return TextModels(*(self.modules.get(name) for name in TEXT))

    @property
    def text_variables(self) -> dict[str, dict | None]:
        return {name: self.variables.get(name) for name in TEXT}

    @property
    def scheduler(self) -> Scheduler:
        """The solver and times that the model is sampled with by default."""
        return read_scheduler(self.configs, self.source)

    @property
    def latent_scale(self) -> dict[str, float]:
        """The scaling and shift from the autoencoder's latents to the denoiser's."""
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
                f" {', '.join(self.modules)}; add a file that has one, after a comma"
            )
        return self.modules[name]

    def fingerprints(self) -> dict[str, str]:
        """`fingerprint` of each part by itself."""
        if "fingerprints" not in self._memo:
            prints = {k: tree.fingerprint(x) for k, x in self.variables.items()}
            self._memo["fingerprints"] = prints
        prints = self._memo["fingerprints"]
        return {k: self.bank.marked(x, [k]) for k, x in prints.items()}

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits of the weights as they are here, on any mesh."""
        if "fingerprint" not in self._memo:
            self._memo["fingerprint"] = tree.fingerprint(self.variables)
        return self.bank.marked(self._memo["fingerprint"], self.variables)


def most_clip_skip(configs: Mapping[str, dict]) -> int:
    """The largest clip_skip: layers that may be dropped before the last but one."""
    depths = [configs[name]["num_hidden_layers"] for name in CLIPS if name in configs]
    return max(min(depths, default=2) - 2, 0)


def read_scheduler(configs: Mapping[str, dict], source: str) -> Scheduler:
    return schedulers.read(configs.get("scheduler"), f"the scheduler of {source}")


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
