"""A released model as one object: modules, variables, tokenizers, configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float

from sd3_jax import tree
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import (
    argument_checks,
    compiled,
    control_arguments,
    evaluation_programs,
)
from sd3_jax.sampling.adapters.adapter_bank import Bank, Sets
from sd3_jax.sampling.adapters.bundle_adapters import WithAdapters
from sd3_jax.sampling.bundle_autoencoder import WithAutoencoder
from sd3_jax.sampling.control import ControlInput
from sd3_jax.sampling.images import input_images as inputs
from sd3_jax.sampling.placement import Stage
from sd3_jax.sampling.schedulers import scheduler_config as schedulers
from sd3_jax.sampling.schedulers.scheduler import Scheduler
from sd3_jax.sampling.text import weighted_prompts
from sd3_jax.sampling.text.bundle_prompts import WithPrompts
from sd3_jax.sampling.text.prompt_tokens import TEXT, Prompt
from sd3_jax.sampling.text.prompts import Conditioning, TextModels
from sd3_jax.weights import components

CLIPS = TEXT[:2]


@dataclass(frozen=True, repr=False)
class Bundle(WithPrompts, WithAdapters, WithAutoencoder):
    """Everything by component: "denoiser", "vae", "clip_l", "clip_g" and "t5".

    `configs` are those of diffusers and transformers and include "scheduler";
    `variables` are linen's, in `dtype`, sharded over `mesh`. A component that the files
    lack has no entry: the denoiser reads zeros in place of a text encoder. Adapters
    stay beside the variables, in `bank`. With the placement "sequential" all of these
    rest in host memory; a method moves those that it uses to the devices, and drops
    those of the method before.
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
    placement: str = "all"  # where `variables` are, one of placement.PLACEMENTS
    _stage: Stage = field(default_factory=Stage, compare=False)
    # The dataclass is frozen; fingerprints read all weights, so they are kept here.
    _memo: dict = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        config = self.configs.get("denoiser")
        name = "" if config is None else components.released_name(config) + "; "
        mesh = ", ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items())
        kind = lambda part: f" {self.quantize[part]}" if part in self.quantize else ""
        parts = ", ".join(part + kind(part) for part in self.modules)
        parts += f"; placement {self.placement}" if self.placement != "all" else ""
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
                f"{self.source} has no text encoder; add a file or folder that has one,"
                " after a comma, or pass embeddings instead of texts"
            )
        table = self.bank.table(adapters, len(prompts))
        tokens = self.tokenize(prompts, max_sequence_length, weighting=weighting)
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
            # Prompts whose weights are all 1 run the usual program: no compilation, and
            # the bits of the plain text.
            variables = self.on_devices(variables)
            if weighting is None or not tokens.is_weighted:
                ids = place(tokens.ids)
                encoded = compiled.encode_prompts(models, variables, ids, **options)
                return self.finished(encoded)
            # The weights are relative to the empty prompt's states (weighted_prompts).
            empty = self.tokenize([""] * len(prompts), max_sequence_length)
            words = tokens.words, empty.words
            encoded = weighted_prompts.encode(
                models, variables, *words, weighting, place=place, **options
            )
            return self.finished(encoded)

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
        args = self.evaluation_arguments(latents, t, context, pooled)
        skipped = argument_checks.skip_layers(skip_layers, module.depth)
        nets, acting = self._controls(control, args[0])
        if residuals is not None:
            residuals = control_arguments.block_residuals(
                residuals, module, args[0].shape, nets
            )
            # Blocks come first, so that the rows are the second axis.
            residuals = compiled.place(residuals, self.mesh, axis=1)
        table = self.bank.table(adapters, len(args[0]), "latents")
        weights = self.adapted("denoiser", table), acting
        with compiled.on(self.mesh, args):
            variables, acting = self.on_devices(weights)
            v = evaluation_programs.velocity(
                module,
                variables,
                *args,
                skip=tuple(skipped),
                nets=nets,
                controls=compiled.place(acting, self.mesh),
                residuals=residuals,
            )
            return self.finished(v)

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
        args = self.evaluation_arguments(latents, t, context, pooled)
        nets, acting = self._controls(control, args[0])
        if not nets:
            raise UserError("no control; give a ControlInput, or a list of them")
        # A net of image tokens alone embeds them with the denoiser's weights.
        table = self.bank.table(adapters, len(args[0]), "latents")
        weights = self.adapted("denoiser", table), acting
        with compiled.on(self.mesh, args):
            variables, acting = self.on_devices(weights)
            acting = compiled.place(acting, self.mesh)
            residuals = evaluation_programs.control_residuals(
                nets, acting, variables, *args
            )
            return self.finished(residuals)

    def on_devices(self, arguments: Any, *, room: float | None = None) -> Any:
        """A program's arguments, with all weights in them on the devices.

        With the placement "sequential", weights of the program before leave them, or
        stay where there are `room` bytes beside them.
        """
        if self.placement == "all":
            return arguments
        return self._stage.enter(arguments, room=room)

    def finished(self, results: Any) -> Any:
        """A program's results, computed if its weights are to leave the devices."""
        # Weights that a running program reads stay in memory beside the next ones.
        return results if self.placement == "all" else jax.block_until_ready(results)

    def evaluation_arguments(self, latents, t, context, pooled) -> tuple[Array, ...]:
        """The arguments of one evaluation, checked and over the mesh."""
        module, config = self.part("denoiser"), self.configs["denoiser"]
        latents = inputs.laid_out(latents, module.channels)
        argument_checks.latent_sides(latents.shape[1:3], module.patch, module.pos_size)
        t = inputs.times(t, len(latents))
        for name, x, axes, key in (
            ("context", context, 3, "joint_attention_dim"),
            ("pooled", pooled, 2, "pooled_projection_dim"),
        ):
            argument_checks.embedding(name, x, axes, config.get(key))
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
        return nets, acting

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

    def unadapted_fingerprint(self, part: str) -> str:
        """The fingerprint of one part's weights, whatever adapters are beside them."""
        key = f"fingerprint of {part}"
        if key not in self._memo:
            self._memo[key] = tree.fingerprint(self.variables[part])
        return self._memo[key]

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
