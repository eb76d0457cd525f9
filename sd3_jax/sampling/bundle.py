"""A released model as one object: modules, variables, tokenizers, configurations."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Int

from sd3_jax import tree
from sd3_jax.data import prompt_text, tokenizers
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks, compiled, control_arguments
from sd3_jax.sampling import input_images as inputs
from sd3_jax.sampling import scheduler_config as schedulers
from sd3_jax.sampling.adapter_bank import Bank, Sets
from sd3_jax.sampling.bundle_adapters import WithAdapters
from sd3_jax.sampling.bundle_autoencoder import WithAutoencoder
from sd3_jax.sampling.control import ControlInput
from sd3_jax.sampling.prompts import Conditioning, TextModels
from sd3_jax.sampling.scheduler import Scheduler
from sd3_jax.weights import components

TEXT = ("clip_l", "clip_g", "t5")
CLIPS = TEXT[:2]


class Prompt(NamedTuple):
    """A text for each encoder; None stands for the text of clip_l."""

    clip_l: str
    clip_g: str | None = None
    t5: str | None = None


@dataclass(frozen=True, repr=False)
class Bundle(WithAdapters, WithAutoencoder):
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
    ) -> Conditioning:
        """(context (b, 77 + length, 4096), pooled (b, 2048)); absent encoders are 0.

        One text is a batch of one. `adapters` are weights by name, or a set a prompt.
        """
        # A Prompt is a tuple of texts and one prompt; a list is a batch.
        prompts = [prompts] if isinstance(prompts, str | Prompt) else prompts
        argument_checks.whole("clip_skip", clip_skip, 0, most_clip_skip(self.configs))
        if not any(self.text_models):
            raise UserError(
                f"{self.source} has no text encoder; pass embeddings instead of texts"
            )
        table = self.bank.table(adapters, len(prompts))
        ids = self.token_ids(prompts, max_sequence_length)
        variables = {name: self.adapted(name, table) for name in self.text_variables}
        # A bundle of text encoders alone encodes for the published models' widths.
        sizes = self.configs.get("denoiser", {})
        with compiled.on(self.mesh):
            return compiled.encode_prompts(
                self.text_models,
                variables,
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
        control: ControlInput | Sequence[ControlInput] | None = None,
        residuals: Any = None,
        adapters: Sets | None = None,
    ) -> Float[Array, "b h w c"]:
        """v = noise - x0 at time t, 1 being noise; `adapters` are as in generate.

        `control` is as in generate, without `start`, `stop` and `unconditional`.
        `residuals` (r, b, n, d), or a list over r blocks, are added to those of
        `control`; r must be that of its nets.
        """
        module = self.part("denoiser")
        args = self._evaluation(latents, t, context, pooled)
        skipped = argument_checks.skip_layers(skip_layers, module.depth)
        nets, acting = self._controls(control, args[0])
        if residuals is not None:
            residuals = control_arguments.block_residuals(
                residuals, module, args[0].shape, nets
            )
            residuals = compiled.place(residuals, self.mesh, axis=1)
        table = self.bank.table(adapters, len(args[0]), "latents")
        variables = self.adapted("denoiser", table)
        with compiled.on(self.mesh, args):
            return compiled.velocity(
                module,
                variables,
                *args,
                skip=tuple(skipped),
                nets=nets,
                controls=acting,
                residuals=residuals,
            )

    def control_residuals(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        t: Float[Array | np.ndarray, " b"],
        context: Float[Array | np.ndarray, "b l k"],
        pooled: Float[Array | np.ndarray, "b e"],
        *,
        control: ControlInput | Sequence[ControlInput],
        adapters: Sets | None = None,
    ) -> Float[Array, "r b n d"]:
        """The ControlNets' residuals at time t, one for each of r blocks, summed.

        They are what `velocity` adds for this `control`. n is the number of image
        tokens and d the denoiser's width.
        """
        args = self._evaluation(latents, t, context, pooled)
        nets, acting = self._controls(control, args[0])
        if not nets:
            raise UserError("no control; give a ControlInput, or a list of them")
        # A net of image tokens alone embeds them with the denoiser's weights.
        table = self.bank.table(adapters, len(args[0]), "latents")
        variables = self.adapted("denoiser", table)
        with compiled.on(self.mesh, args):
            return compiled.control_residuals(nets, acting, variables, *args)

    def _evaluation(self, latents, t, context, pooled) -> tuple[Array, ...]:
        """The arguments of one evaluation, checked and over the mesh."""
        latents = inputs.laid_out(latents, self.part("denoiser").channels)
        t = inputs.times(t, len(latents))
        # Checked here: in the program unequal rows would broadcast or fail obscurely.
        rows = {len(latents), len(context), len(pooled)}
        if len(rows) > 1:
            raise UserError(
                f"{len(latents)} latents, {len(context)} rows of context and"
                f" {len(pooled)} of pooled: the numbers must be equal"
            )
        return compiled.place((latents, t, context, pooled), self.mesh)

    def _controls(self, control, latents: Array) -> tuple[tuple, tuple]:
        b, *shape = latents.shape
        controls = control_arguments.listed(control)
        nets, acting = control_arguments.controls_at_a_time(
            self, controls, tuple(shape), b
        )
        return nets, compiled.place(acting, self.mesh)

    def token_ids(
        self,
        prompts: Sequence[str | Prompt],
        length: int,
        *,
        encoders: Container[str] | None = None,
        cut: Counter[str] | None = None,
    ) -> dict[str, Int[np.ndarray, "b _"]]:
        """The token ids that encode_prompts reads: "ids_clip_l" and so on.

        `encoders` defaults to the bundle's; those named need not have their weights.
        Prompts that an encoder truncates are logged, or counted in `cut` by encoder.
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
                    f"{self.source} has no tokenizer for {name}; set"
                    " tokenizers_from=FOLDER, a diffusers folder or a hub name"
                )
            texts = [
                prompt_text.checked(p.clip_l if p[i] is None else p[i]) for p in full
            ]
            # CLIP's length is the size of its position table; T5 has relative
            # positions and takes any length.
            encoder, most = "T5", length
            if name != "t5":
                encoder, most = "CLIP", self.configs[name]["max_position_embeddings"]
            ids[f"ids_{name}"] = tokenizers.token_ids(
                self.tokenizers[name], texts, most, encoder=encoder, cut=cut
            )
        return ids

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
