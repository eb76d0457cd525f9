"""The same sampling trajectory on both sides, and how far they drift apart."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import torch

from sd3_jax.diffusion import solvers
from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling import compiled
from sd3_jax.sampling.generate import generate
from sd3_jax.sampling.schedulers import scheduler_config as schedulers
from sd3_jax.sampling.text.prompts import Conditioning
from sd3_jax.tools.parity import torch_components
from sd3_jax.tools.parity.component_comparison import BF16, Row, Subject, row_of


class Drift(NamedTuple):
    """Gaps of the latents after each step, and of the decoded pictures."""

    t: list[float]
    rows: list[Row]
    picture: Row
    pictures: dict[str, np.ndarray]  # "ours", "theirs" (h, w, 3) in [0, 1]


def drift(subject: Subject) -> Drift:
    """Samples the first prompt with guidance on both sides, from one noise and with
    each side's text encoders; differences accumulate over the steps."""
    s, noise = subject.settings, subject.latents(1, seed=1)
    texts = [s.prompts[0], ""]
    narrow = {}
    scheduler = subject.scheduler
    # Text first, denoiser and autoencoder later: never all models in memory at once.
    conds = _their_text(subject, texts)
    modules = [subject.theirs(name) for name in ("denoiser", "vae")]
    for dtype, (cond, uncond) in conds.items():
        narrow[dtype] = torch_components.trajectory(
            *(module.to(dtype) for module in modules),
            scheduler,
            cond,
            uncond,
            noise,
            steps=s.steps,
            scale=s.scale,
        )
    del modules
    trajectories = {dtype: _ours(subject, texts, noise, dtype) for dtype in DTYPES}
    # PyTorch in float32 is the reference of all three others.
    (theirs, picture), (theirs_half, half_picture) = narrow[torch.float32], narrow[BF16]
    (ours, our_picture), (ours_half, our_half_picture) = trajectories.values()
    # Ours begin with the noise, theirs with the latents after the first step.
    steps = zip(ours[1:], ours_half[1:], theirs_half, theirs)
    rows = [row_of(f"step {i}", *latents) for i, latents in enumerate(steps, 1)]
    end = row_of("picture", our_picture, our_half_picture, half_picture, picture)
    grid = _grid(subject)
    pictures = {"ours": our_picture[0], "theirs": picture[0]}
    pictures["ours, bfloat16"] = our_half_picture[0]
    return Drift(grid[1:].tolist(), rows, end, pictures)


DTYPES = ("float32", "bfloat16")


def _grid(subject: Subject) -> np.ndarray:
    s, config = subject.settings, subject.configs["denoiser"]
    tokens = np.prod(subject.latents(1).shape[1:3]) // config.get("patch_size", 2) ** 2
    return schedulers.read(subject.scheduler).sampler(s.steps, int(tokens))[1]


def _their_text(subject: Subject, texts: list[str]) -> dict:
    """(cond, uncond) by dtype."""
    names = [name for name in bundles.TEXT if name in subject.configs]
    modules = {name: subject.theirs(name) for name in names}
    words, length = subject.load("float32").tokenizers, subject.settings.length
    embeddings = {}
    for dtype in (torch.float32, BF16):
        modules = {name: module.to(dtype) for name, module in modules.items()}
        context, pooled = torch_components.encoded(modules, words, texts, length)
        embeddings[dtype] = (context[:1], pooled[:1]), (context[1:], pooled[1:])
    return embeddings


def _ours(subject: Subject, texts, noise, dtype) -> tuple[np.ndarray, np.ndarray]:
    s = subject.settings
    bundle = subject.load(dtype, *bundles.TEXT)
    # One batch for prompt and negative prompt: (2, 77 + length, 4096).
    embeddings = bundle.encode_prompts(texts, s.length)
    cond, uncond = (Conditioning(*(x[i : i + 1] for x in embeddings)) for i in (0, 1))
    bundle = subject.load(dtype, "denoiser", "vae")
    module, grid = bundle.modules["denoiser"], _grid(subject)

    @jax.jit
    def run(variables, cond, uncond, noise):
        return generate(
            lambda x, t, cond: module.apply(variables, x, t, *cond),
            None,
            cond,
            uncond,
            shape=noise.shape[1:],
            grid=grid,
            # (steps + 1, b, h, w, c); the first is the noise itself.
            solver=functools.partial(solvers.euler, trajectory=True),
            scale=s.scale,
            noise=noise,
        )

    args = compiled.place((cond, uncond, noise), bundle.mesh)
    with compiled.on(bundle.mesh):
        visited = run(bundle.variables["denoiser"], *args)
    images = bundle.decode(visited[-1])
    return np.asarray(visited), np.asarray(images)
