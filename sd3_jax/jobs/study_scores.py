"""What a study measures of a run: its validation loss, and its pictures' scores."""

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sd3_jax import cli, hosts, sharding
from sd3_jax.data import digits
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.errors import ConfigError
from sd3_jax.evals import compose
from sd3_jax.evals.reader import matches
from sd3_jax.jobs import assemble, paint
from sd3_jax.validate import validate

log = logging.getLogger(__name__)


def measure(
    config: ConfigDict,
    folder: epath.Path,
    validations: list[dict],
    result: dict,
    keep: Callable[[dict], None],
) -> None:
    """Adds to `result`, and keeps it after every sampler setting: those are not done
    again. The step is that of the least validation loss among those saved (B.3)."""
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        parts = assemble.parts(config)
        saved = hosts.first(lambda: steps(assemble.checkpoints(folder)))
        best = min(
            (row for row in validations if row["step"] in saved),
            key=lambda row: row["loss"],
        )
        about = json.loads((folder / "run.json").read_text())
        result |= {
            "step": best["step"],
            "loss": best["loss"],
            "validation": [
                {k: v for k, v in row.items() if k.startswith(("loss", "step"))}
                for row in validations
            ],
            "path_of_flow": config.flow.path,
            "parameters": about["parameters_by_model"]["denoiser"],
            "flops": 3 * about["forward_flops_per_image"] * config.data.batch_size,
            "scores": result.get("scores", []),
        }
        judge = judge_of(config)
        for setting in config.study.settings:
            own, painter = sampling(config, setting), None
            sampler = {"steps": own.sample.steps, "cfg": own.sample.cfg}
            for weights in config.study.weights:
                key = {"weights": weights, "setting": setting}
                if any(key.items() <= row.items() for row in result["scores"]):
                    continue
                own.sample.weights = weights
                params, _ = assemble.trained_params(
                    own, parts, folder, mesh, step=best["step"]
                )
                painter = painter or Traveller(own, parts, mesh)
                found = judge(painter, params)
                result["scores"].append(key | sampler | found)
                keep(result)
    keep(result | {"complete": True})


def steps(folder: epath.Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def sampling(config: ConfigDict, setting: str) -> ConfigDict:
    """The config with a sampler setting: "steps=50 cfg=2.5"."""
    config = config.copy_and_resolve_references()
    for text in setting.split():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"config.study.settings: {text!r}: wanted KEY=VALUE")
        cli.override(config, f"sample.{key}", value)
    validate(config)
    return config


class fid:
    def frechet(a, b):
        (m1, s1), (m2, s2) = a, b
        w, v = np.linalg.eigh(s1)
        root = (v * np.sqrt(np.maximum(w, 0))) @ v.T
        eig = np.linalg.eigvalsh(root @ s2 @ root)
        return float(
            ((m1 - m2) ** 2).sum()
            + np.trace(s1)
            + np.trace(s2)
            - 2 * np.sqrt(np.maximum(eig, 0)).sum()
        )


class statistics:
    def of(x):
        return x.mean(0), np.cov(x.T)


def pixels(images):
    return images.reshape(len(images), -1) / 255.0


class Judge(NamedTuple):
    """Pictures of fixed prompts: how well they show what was asked, and how far they
    are from real ones."""

    captions: Sequence[str]
    score: Callable[[np.ndarray], dict[str, float]]  # of pictures u8 (n, h, w, 3)
    distance: Callable[[np.ndarray], float]  # FID

    def __call__(self, painter: "Traveller", params: dict) -> dict[str, float]:
        n = len(self.captions)
        images = painter(params, self.captions, list(range(n)))
        path = float(np.mean(np.concatenate(painter.lengths)[:n]))
        painter.lengths.clear()
        about = {"fid": self.distance(images), "path": path, "n": len(images)}
        return {**self.score(images), **about}


class Traveller(paint.Painter):
    """A painter that notes how long the way of each picture was: the sum of |v dt|."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lengths = []
        solver = SOLVERS[self.config.sample.solver]
        travel = jax.jit(partial(self.travel, solver=partial(solver, trajectory=True)))
        self.program = partial(self.note, travel)

    def travel(self, params: dict, batch: dict, solver: Callable):
        way = self.latents(params, batch, solver)  # (n, b, h, w, c)
        steps = jnp.square(jnp.diff(way, axis=0)).sum(axis=(2, 3, 4))
        return self.parts.autoencoder.decode(way[-1]), jnp.sqrt(steps).sum(0)

    def note(self, travel: Callable, params: dict, batch: dict) -> jax.Array:
        image, length = travel(params, batch)
        self.lengths.append(multihost_utils.process_allgather(length, tiled=True))
        return image


def judge_of(config: ConfigDict) -> Judge:
    if config.data.name == "digits":
        return of_digits(config)
    return of_pictures(config)


def of_digits(config: ConfigDict) -> Judge:
    """Scenes of the recipe's mix that training never shows, and real ones of them."""
    counts = np.array(config.data.mix) / sum(config.data.mix) * config.study.pictures
    scenes = []
    for kind, count in zip(digits.KINDS, counts.round().astype(int).tolist()):
        split = "train" if kind == "single" else config.eval.split
        scenes += compose.some(kind, split, count) if count else []
    canvas = digits.Digits(config.image.height, config.image.width, held_out=True)
    hands = digits.draws(1, np.arange(len(scenes)), 2)
    real = np.stack([canvas.draw(scene, u) for scene, u in zip(scenes, hands)])

    def score(images):
        right = np.array([matches(scene, x) for scene, x in zip(scenes, images)])
        kinds = np.array([scene.kind for scene in scenes])
        found = {f"score_{k}": float(right[kinds == k].mean()) for k in set(kinds)}
        return {"score": float(right.mean()), **found}

    reference = statistics.of(pixels(real))
    distance = lambda images: fid.frechet(statistics.of(pixels(images)), reference)
    return Judge([*map(str, scenes)], score, distance)
