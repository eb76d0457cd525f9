"""What a study measures of a run: its validation loss, and its pictures' scores."""

import json
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sd3_jax.assembly import model_parts
from sd3_jax.config import command_line
from sd3_jax.config.validation import validate
from sd3_jax.data import digits
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.distributed import processes, sharding
from sd3_jax.errors import ConfigError
from sd3_jax.evaluation import (
    digit_scenes,
    feature_statistics,
    fid,
    picture_features,
    picture_scores,
    reference_images,
)
from sd3_jax.evaluation.digit_reader import matches
from sd3_jax.evaluation.extractors import pixels
from sd3_jax.sampling import sampler as paint


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
        parts = model_parts.build_parts(config)
        saved = processes.first(lambda: steps(model_parts.checkpoints(folder)))
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
        judge, encoder = judge_of(config), None
        painters: dict[str, Traveller] = {}
        for weights in config.study.weights:
            known = [x["setting"] for x in result["scores"] if x["weights"] == weights]
            left = [x for x in config.study.settings if x not in known]
            if not left:
                continue
            config.sample.weights = weights
            params, _ = model_parts.trained_params(
                config, parts, folder, mesh, step=best["step"]
            )
            for setting in left:
                own = sampling(config, setting)
                if setting not in painters:
                    painters[setting] = Traveller(own, parts, mesh, encoder)
                painter = painters[setting]
                found = judge(painter, params) | {"path": painter.length()}
                encoder = painter.encoder
                key = {"weights": weights, "setting": setting}
                sampler = {"steps": own.sample.steps, "cfg": own.sample.cfg}
                result["scores"].append(key | sampler | found)
                keep(result)
    keep(result | {"complete": True})


def steps(folder: epath.Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]


def sampling(config: ConfigDict, setting: str) -> ConfigDict:
    """The config with a sampler setting: "steps=50 cfg=2.5"."""
    config = config.copy_and_resolve_references()
    for text in setting.split():
        override(config, f"sample.{text}", "config.study.settings")
    if config.sample.step:
        raise ConfigError(
            f"config.study.settings: config.sample.step = {config.sample.step}: wanted"
            " 0, for a study takes the step of the least validation loss; did you mean"
            ' "steps"?'
        )
    validate(config)
    return config


def override(config: ConfigDict, text: str, where: str) -> None:
    """KEY=VALUE, as a flag would set it."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{where}: {text!r}: wanted KEY=VALUE")
    try:
        command_line.override(config, key, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


class Traveller(paint.Painter):
    """A painter that notes how long the way of each picture was: the sum of |v dt|."""

    def __init__(self, *args):
        super().__init__(*args)
        self.lengths = []
        solver = SOLVERS[self.sampler[0]]
        travel = jax.jit(partial(self.travel, solver=partial(solver, trajectory=True)))
        self.program = partial(self.note, travel)

    def travel(self, params: dict, batch: dict, negative: dict, solver: Callable):
        way = self.latents(params, batch, negative, solver)  # (n, b, h, w, c)
        steps = jnp.square(jnp.diff(way, axis=0)).sum(axis=(2, 3, 4))
        last = way[-1]
        image = last if self.encoder else self.parts.autoencoder.decode(last)
        return image, jnp.sqrt(steps).sum(0)

    def note(self, travel: Callable, *args) -> jax.Array:
        image, length = travel(*args)
        self.lengths.append(multihost_utils.process_allgather(length, tiled=True))
        return image

    def length(self) -> float:
        """The mean since it was last asked for."""
        lengths, self.lengths = np.concatenate(self.lengths), []
        return float(lengths.mean())


def check(config: ConfigDict) -> None:
    """UserError, before anything is trained, if there is nothing to measure with."""
    if config.data.name != "digits":
        paint.check(config)
        picture_scores.check(as_evaluated(config))


def as_evaluated(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    measures = dict(pictures=config.study.pictures, scores=("clip_score", "fid"))
    config.eval.update(measures)
    return config


class Digits:
    """Scenes of the recipe's mix that training never shows, and real ones of them: the
    share of pictures that are right, and FID on pixels."""

    def __init__(self, config: ConfigDict):
        counts = np.array(config.data.mix) / sum(config.data.mix)
        counts = np.rint(counts * config.study.pictures).astype(int).tolist()
        self.scenes = []
        for kind, count in zip(digits.KINDS, counts):
            split = "train" if kind == "single" else config.eval.split
            self.scenes += digit_scenes.some(kind, split, count) if count else []
        canvas = digits.Digits(config.image.height, config.image.width, held_out=True)
        hands = digits.draws(1, np.arange(len(self.scenes)), 2)
        real = [canvas.draw(scene, u) for scene, u in zip(self.scenes, hands)]
        self.reference = feature_statistics.of(pixels(np.stack(real)))

    def __call__(self, painter: Traveller, params: dict) -> dict[str, float]:
        captions = [str(scene) for scene in self.scenes]
        images = painter(params, captions, list(range(len(captions))))
        right = np.array([matches(*pair) for pair in zip(self.scenes, images)])
        kinds = np.array([scene.kind for scene in self.scenes])
        each = {f"score_{k}": float(right[kinds == k].mean()) for k in sorted({*kinds})}
        far = fid.frechet(feature_statistics.of(pixels(images)), self.reference)
        return {"score": float(right.mean()), **each, "fid": far}


class Pictures:
    """CLIP score and FID of captions and pictures as `evaluate` takes them."""

    def __init__(self, config: ConfigDict):
        self.config = own = as_evaluated(config)
        self.clip = picture_features.load_clip(own)
        self.extract = picture_features.extractor(own, lambda: self.clip)
        self.captions = reference_images.captions(own)
        self.reference = picture_scores.references(own, self.extract, ["fid"])

    def __call__(self, painter: Traveller, params: dict) -> dict[str, float]:
        made, cosines = picture_scores.look(
            self.config,
            partial(painter, params),
            self.captions,
            self.extract,
            self.clip,
            True,
        )
        far = fid.frechet(made.statistics, self.reference.statistics)
        return {"score": float(cosines.mean()), "fid": far}


def judge_of(config: ConfigDict) -> Callable[[Traveller, dict], dict[str, float]]:
    return Digits(config) if config.data.name == "digits" else Pictures(config)
