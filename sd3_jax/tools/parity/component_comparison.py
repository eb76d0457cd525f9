"""Every component's layers on both sides, at the same inputs."""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh

from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling import bundle_loading, compiled
from sd3_jax.sampling.schedulers import scheduler_config as schedulers
from sd3_jax.tools.parity import layer_pairs, torch_components
from sd3_jax.tools.parity.gap import Gap, gap
from sd3_jax.weights import components, sources
from sd3_jax.weights.components import COMPONENTS

log = logging.getLogger(__name__)
HALVES = {"vae encoder": ("vae", "encode"), "vae decoder": ("vae", "decode")}
BF16 = torch.bfloat16


class Settings(NamedTuple):
    """The inputs and sampler settings of both sides."""

    prompts: tuple[str, ...]
    height: int
    width: int
    length: int  # of T5's tokens
    steps: int
    scale: float
    seed: int = 0


class Row(NamedTuple):
    """A layer's gaps to PyTorch in float32: of ours in float32 and bfloat16, and of
    PyTorch in bfloat16."""

    layer: str
    float32: Gap
    bfloat16: Gap
    theirs: Gap


def row_of(layer: str, ours, ours_half, theirs_half, theirs) -> Row:
    """The row of a layer's outputs; `theirs`, in float32, is what all are held to."""
    return Row(layer, *(gap(x, theirs) for x in (ours, ours_half, theirs_half)))


class Subject:
    """A source of weights, its components' configurations and their inputs."""

    def __init__(self, source: str, tokenizers: str, settings: Settings, mesh: Mesh):
        self.source, self.tokenizers, self.settings = source, tokenizers, settings
        self.mesh = mesh
        self.path = sources.resolve(source)
        self.configs = {
            name: part.config for name, part in sources.parts(self.path).items()
        }

    @functools.cached_property
    def scheduler(self) -> dict:
        """The folder's configuration if it is Euler's method, else a published one."""
        config = self.configs.get("scheduler", {"shift": 3.0})
        scheduler = schedulers.read(config)
        if (scheduler.solver, scheduler.line) == ("euler", "released"):
            if not scheduler.refused:
                return config
        log.warning("%s: its scheduler is not compared; Euler's is", self.source)
        return {"shift": scheduler.shift}

    @property
    def name(self) -> str:
        if "denoiser" not in self.configs:
            return self.source
        return components.released_name(self.configs["denoiser"]).split(":")[0]

    def load(self, dtype: str, *only: str) -> bundles.Bundle:
        return bundle_loading.load(
            self.source,
            mesh=self.mesh,
            dtype=dtype,
            tokenizers_from=self.tokenizers,
            only=only,
        )

    def theirs(self, name: str) -> torch.nn.Module:
        return torch_components.component(self.path, name, self.configs[name])

    @functools.cached_property
    def ids(self) -> dict[str, np.ndarray]:
        s, bundle = self.settings, self.load("float32")  # no weights
        # Tokenizers alone are loaded: both sides get the same ids.
        return bundle.token_ids(s.prompts, s.length, encoders=self.configs)

    def images(self) -> np.ndarray:
        """Smooth images in [-1, 1]: a few waves in random colours."""
        draw = np.random.default_rng(self.settings.seed)
        s = self.settings
        y, x = np.mgrid[: s.height, : s.width] / max(s.height, s.width)
        # Smooth, because white noise is far from what the autoencoder was trained on.
        waves = draw.uniform(-9, 9, (8, 2)) @ np.stack([y.ravel(), x.ravel()])
        colours = draw.standard_normal((8, 3))
        image = np.sin(waves + draw.uniform(0, 6, (8, 1))).T @ colours
        image = image.reshape(1, s.height, s.width, 3) / np.abs(image).max()
        return image.astype(np.float32)

    def latents(self, b: int, seed: int = 0) -> np.ndarray:
        draw = np.random.default_rng((self.settings.seed, seed))
        # Every level of the autoencoder but the first halves the sides.
        factor = 2 ** (len(self.configs["vae"]["block_out_channels"]) - 1)
        side = self.settings.height // factor, self.settings.width // factor
        channels = self.configs["denoiser"].get("in_channels", 16)
        return draw.standard_normal((b, *side, channels)).astype(np.float32)


def parts(subject: Subject) -> Iterator[tuple[str, list[Row]]]:
    """The rows of every component's layers."""
    for name in COMPONENTS:
        if name not in subject.configs:
            continue
        module = subject.theirs(name)
        labels = HALVES if name == "vae" else {name: (name, None)}
        cases = {label: CASES[name](subject, label) for label in labels}
        wide = {
            label: case.theirs(module, torch.float32) for label, case in cases.items()
        }
        # In place, after the float32 pass: T5-XXL alone takes 19 GB in float32.
        module.to(BF16)
        narrow = {label: case.theirs(module, BF16) for label, case in cases.items()}
        # PyTorch's copy is freed before ours is loaded.
        del module
        answers = {}
        for dtype in ("float32", "bfloat16"):
            bundle = subject.load(dtype, name)
            for label, case in cases.items():
                answers[label, dtype] = case.ours(bundle)
        for label in cases:
            ours = (answers[label, dtype] for dtype in ("float32", "bfloat16"))
            sides = *ours, narrow[label], wide[label]
            yield (
                label,
                [row_of(layer, *(x[layer] for x in sides)) for layer in wide[label]],
            )


class Case(NamedTuple):
    """One component with its inputs; both sides return outputs by layer."""

    name: str
    table: Any  # (variables) -> list of Layer
    args: tuple
    call: Any  # (module, dtype) -> what PyTorch computes
    method: str | None = None

    def ours(self, bundle: bundles.Bundle) -> dict[str, np.ndarray]:
        module, variables = bundle.modules[self.name], bundle.variables[self.name]
        table = self.table(variables)

        @jax.jit
        def run(variables, *args):
            options = {"method": self.method} if self.method else {}
            # capture_intermediates stores the output of every submodule's __call__.
            _, state = module.apply(
                variables,
                *args,
                capture_intermediates=True,
                mutable=["intermediates"],
                **options,
            )
            taken = state["intermediates"]
            return {x.name: x.ours(taken).astype(jnp.float32) for x in table}

        args = compiled.place(self.args, bundle.mesh)
        with compiled.on(bundle.mesh):
            return jax.tree.map(np.asarray, run(variables, *args))

    def theirs(self, module: torch.nn.Module, dtype: torch.dtype) -> dict:
        table = self.table(None)
        wanted = {x.name: (x.theirs, x.pick) for x in table}
        return torch_components.captured(module, lambda m: self.call(m, dtype), wanted)


def _text_case(subject: Subject, label: str) -> Case:
    ids, config = subject.ids[f"ids_{label}"], subject.configs[label]
    rows = layer_pairs.t5(config) if label == "t5" else layer_pairs.clip(config)
    call = lambda module, dtype: module(torch.tensor(ids).long())
    return Case(label, lambda variables: rows, (ids,), call)


def _vae_case(subject: Subject, label: str) -> Case:
    config, half = subject.configs["vae"], HALVES[label][1]
    rows = (
        layer_pairs.encoder(config) if half == "encode" else layer_pairs.decoder(config)
    )
    x = subject.images() if half == "encode" else subject.latents(1)
    call = lambda module, dtype: getattr(module, half)(torch_components.nchw(x, dtype))
    return Case("vae", lambda variables: rows, (x,), call, half)


def _denoiser_case(subject: Subject, label: str) -> Case:
    """Two examples, near the noise and near the data."""
    config, xt = subject.configs["denoiser"], subject.latents(2)
    t = np.array([0.97, 0.2], np.float32)
    draw = np.random.default_rng((subject.settings.seed, 9))
    tokens = 77 + subject.settings.length
    context = draw.standard_normal((2, tokens, config["joint_attention_dim"]))
    pooled = draw.standard_normal((2, config["pooled_projection_dim"]))
    context, pooled = context.astype(np.float32), pooled.astype(np.float32)

    def table(variables):
        if variables is None:  # PyTorch's side needs the names alone
            side = config["pos_embed_max_size"]
            width = config["num_attention_heads"] * config["attention_head_dim"]
            empty = jnp.zeros((1, side**2, width))
            variables = {"buffers": {"pos_embed": empty}}
        return layer_pairs.denoiser(config, variables, xt.shape[1:3])

    def call(module, dtype):
        return module(
            torch_components.nchw(xt, dtype),
            timestep=torch.tensor(t) * 1000,
            encoder_hidden_states=torch.tensor(context).to(dtype),
            pooled_projections=torch.tensor(pooled).to(dtype),
        )

    return Case("denoiser", table, (xt, t, context, pooled), call)


CASES = {
    "denoiser": _denoiser_case,
    "vae": _vae_case,
    "clip_l": _text_case,
    "clip_g": _text_case,
    "t5": _text_case,
}
