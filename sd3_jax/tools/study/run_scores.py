"""A study's measurements of a run: its validation loss, and scores of pictures."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.assembly import model_parts
from sd3_jax.checkpoints import step_folders
from sd3_jax.config import command_line
from sd3_jax.config.validation import validate
from sd3_jax.data import digits
from sd3_jax.diffusion.solvers import SOLVERS
from sd3_jax.distributed import sharding
from sd3_jax.errors import ConfigError, UserError
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
from sd3_jax.sampling import compiled
from sd3_jax.sampling.job.sampler import TrainedSampler, require_text_encoders


def measure(
    config: ConfigDict,
    folder: epath.Path,
    validations: list[dict],
    result: dict,
    keep: Callable[[dict], None],
) -> None:
    """Adds scores to `result` and saves it after every sampler setting, so that none is
    repeated. It takes the checkpoint with the least validation loss (B.3)."""
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        parts = model_parts.build_parts(config)
        saved = step_folders.shared_steps(model_parts.checkpoints(folder))
        best = min(
            (row for row in validations if row["step"] in saved),
            # NaN is neither more nor less, and min would keep it if it came first.
            key=lambda row: math.inf if math.isnan(row["loss"]) else row["loss"],
        )
        about = files.read_object(folder / "run.json")
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
        samplers: dict[str, Traveller] = {}
        for weights in config.study.weights:
            # A study that was killed goes on after the last sampler setting.
            known = [x["setting"] for x in result["scores"] if x["weights"] == weights]
            left = [x for x in config.study.settings if x not in known]
            if not left:
                continue
            config.sample.weights = weights
            params, _ = model_parts.trained_params(
                config, parts, folder, mesh, step=best["step"]
            )
            for setting in left:
                setting_config = sampling(config, setting)
                # One sampler for a setting serves all kinds of weights: they share a
                # program.
                if setting not in samplers:
                    samplers[setting] = Traveller(setting_config, parts, mesh, encoder)
                sampler = samplers[setting]
                measured = judge(sampler, params) | {"path": sampler.length()}
                encoder = sampler.encoder
                key = {"weights": weights, "setting": setting}
                sampler_settings = {
                    "steps": setting_config.sample.steps,
                    "cfg": setting_config.sample.cfg,
                }
                result["scores"].append(key | sampler_settings | measured)
                keep(result)
    keep(result | {"complete": True})


def sampling(config: ConfigDict, setting: str) -> ConfigDict:
    """The config with a sampler setting: "steps=50 cfg=2.5"."""
    config = config.copy_and_resolve_references()
    for text in setting.split():
        override(config, f"sample.{text}", "config.study.settings")
    # "step=50" is one letter from "steps=50" and would pick a checkpoint.
    if config.sample.step:
        raise ConfigError(
            f"config.study.settings: config.sample.step = {config.sample.step}: must be"
            " 0, because a study takes the step with the least validation loss; did you"
            ' mean "steps"?'
        )
    validate(config)
    return config


def override(config: ConfigDict, text: str, where: str) -> None:
    """KEY=VALUE, as a flag would set it."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{where}: {text!r}: expected KEY=VALUE")
    try:
        command_line.override(config, key, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


class Traveller(TrainedSampler):
    """A sampler that also measures each trajectory's length, the sum of |v dt|."""

    def __init__(self, *args):
        super().__init__(*args)
        if self.cache is not None:
            raise UserError(
                "config.sample.cache: the score of trajectories' lengths runs without a"
                " cache; leave it out"
            )
        self.lengths = []
        solver = SOLVERS[self.solver_and_grid[0]]
        travel = jax.jit(partial(self.travel, solver=partial(solver, trajectory=True)))
        # Replaces the parent's jitted program; __call__ stays as it is.
        self.program = partial(self.note, travel)

    def travel(
        self,
        params: dict,
        batch: dict,
        negative: dict,
        guide: dict | None,
        solver: Callable,
    ):
        grid = self.parts.formulation.grid(self.solver_and_grid[1])
        inputs = self.guidance_inputs(np.asarray(grid))
        if "scales" in inputs:
            inputs["scales"] = inputs["scales"][: len(grid)]  # without the padding
        # (n, b, h, w, c)
        way = self.latents(
            params, batch, negative, solver, grid=grid, guide=guide, **inputs
        )
        # (n - 1, b): the squared length of each step. A straight path is as long as the
        # distance of its ends.
        steps = jnp.square(jnp.diff(way, axis=0)).sum(axis=(2, 3, 4))
        last = way[-1]
        image = last if self.encoder else self.parts.autoencoder.decode(last)
        return image, jnp.sqrt(steps).sum(0)

    def note(
        self,
        travel: Callable,
        params: dict,
        batch: dict,
        negative: dict,
        _: dict,
        guide: dict | None,
    ) -> jax.Array:
        # A trajectory has all steps of its grid, so they are no argument here.
        image, length = travel(params, batch, negative, guide)
        self.lengths.append(multihost_utils.process_allgather(length, tiled=True))
        return image

    def length(self) -> float:
        """The mean length since the last call."""
        lengths, self.lengths = np.concatenate(self.lengths), []
        return float(lengths.mean())


def check(config: ConfigDict) -> None:
    """UserError, before anything is trained, if there is nothing to measure with."""
    if config.data.name != "digits":
        require_text_encoders(config)
        picture_scores.check(as_evaluated(config))


def as_evaluated(config: ConfigDict) -> ConfigDict:
    config = config.copy_and_resolve_references()
    measures = dict(pictures=config.study.pictures, scores=("clip_score", "fid"))
    # `study` measures what `evaluate` does, with its own number of pictures.
    config.eval.update(measures)
    return config


class Digits:
    """The share of right pictures and FID on pixels, for held-out scenes of the
    recipe's mix, against real pictures of the same scenes."""

    def __init__(self, config: ConfigDict):
        counts = np.array(config.data.mix) / sum(config.data.mix)
        counts = np.rint(counts * config.study.pictures).astype(int).tolist()
        self.scenes = []
        for kind, count in zip(digits.KINDS, counts):
            split = "train" if kind == "single" else config.eval.split
            self.scenes += (
                digit_scenes.sample_scenes(kind, split, count) if count else []
            )
        canvas = digits.Digits(config.image.height, config.image.width, held_out=True)
        hands = digits.draws(1, np.arange(len(self.scenes)), 2)
        real = [canvas.draw(scene, u) for scene, u in zip(self.scenes, hands)]
        self.reference = feature_statistics.of(pixels(np.stack(real)))

    def __call__(self, sampler: Traveller, params: dict) -> dict[str, float]:
        captions = [str(scene) for scene in self.scenes]
        images = sampler(params, captions, list(range(len(captions))))
        right = np.array([matches(*pair) for pair in zip(self.scenes, images)])
        kinds = np.array([scene.kind for scene in self.scenes])
        by_kind = {
            f"score_{k}": float(right[kinds == k].mean()) for k in sorted({*kinds})
        }
        far = fid.frechet(feature_statistics.of(pixels(images)), self.reference)
        return {"score": float(right.mean()), **by_kind, "fid": far}


class Pictures:
    """CLIP score and FID of captions and pictures as `evaluate` takes them."""

    def __init__(self, config: ConfigDict):
        self.config = eval_config = as_evaluated(config)
        self.clip = picture_features.load_clip(eval_config)
        self.extract = picture_features.extractor(eval_config, lambda: self.clip)
        self.captions = reference_images.captions(eval_config)
        self.reference = picture_scores.references(eval_config, self.extract, ["fid"])

    def __call__(self, sampler: Traveller, params: dict) -> dict[str, float]:
        sampled, cosines = picture_scores.look(
            self.config,
            partial(sampler, params),
            self.captions,
            self.extract,
            self.clip,
            True,
        )
        far = fid.frechet(sampled.statistics, self.reference.statistics)
        return {"score": float(cosines.mean()), "fid": far}


def judge_of(config: ConfigDict) -> Callable[[Traveller, dict], dict[str, float]]:
    return Digits(config) if config.data.name == "digits" else Pictures(config)
