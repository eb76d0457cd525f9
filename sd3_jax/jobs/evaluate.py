"""Scores a checkpoint, the newest unless config.sample.step names another.

The table is printed and written to scores.json.
"""

import functools
import json

import jax
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.assembly import model_parts
from sd3_jax.data.digits import KINDS
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError, nearest
from sd3_jax.evaluation import digit_scenes, picture_scores, prompt_scores, scorers
from sd3_jax.evaluation.scorers import Asked
from sd3_jax.files import write_whole
from sd3_jax.sampling import compiled
from sd3_jax.sampling.job import prompt_file, released_sampler
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.training.held_out_loss import Validation


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Runs config.eval.scores: "val_loss" and, for pictures of digits, "digits"."""
    check(config)
    workdir = epath.Path(workdir)
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        parts, params, result = weights(config, workdir, mesh)
        # Kept beside the scores: they are comparable only at equal settings.
        result["settings"] = config.sample.to_dict() | config.eval.to_dict()
        result["quantize"] = {k: v for k, v in config.quantize.items() if v}
        # Several names may share one function (CLIP score, FID, …), which runs once.
        for score in dict.fromkeys(SCORES[name] for name in config.eval.scores):
            add(result, score(config, parts, mesh, params))
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "scores.json", json.dumps(result, indent=2).encode())
        print(*lines(result), sep="\n")


def check(config: ConfigDict) -> None:
    """UserError for scores that cannot be computed, before anything is loaded."""
    if not config.eval.scores:
        raise UserError(
            f"config.eval.scores = (): set at least one of {', '.join(SCORES)}"
        )
    for name in config.eval.scores:
        if name not in SCORES:
            raise UserError(f'config.eval.scores: "{name}"{nearest(name, SCORES)}')
    picture_scores.check(config)
    prompt_scores.check(config)


def weights(config: ConfigDict, workdir: epath.Path, mesh):
    """(parts, params, facts for scores.json) of the checkpoint, or (None, bundle,
    facts) of config.weights. sampler_for takes either pair."""
    if not config.weights:
        parts = model_parts.build_parts(config)
        params, step = model_parts.trained_params(config, parts, workdir, mesh)
        about = {"step": step, "weights": config.sample.weights}
        if trained_with := model_parts.trained_encoders(workdir, step):
            parts = parts._replace(encoders=trained_with)
            about["encoders"] = trained_with
        return parts, params, about
    # These need a run's objective and its parameters, which released weights lack.
    if of_runs := sorted({"val_loss", "digits"} & set(config.eval.scores)):
        raise UserError(
            f'config.eval.scores: "{of_runs[0]}" needs a trained run, but'
            f" config.weights = {config.weights}; use scores of pictures, or remove"
            " config.weights"
        )
    settings = prompt_file.task(config, "", 0).settings
    bundle = released_sampler.load_for_sampling(config, mesh, [settings])
    about = {"weights": config.weights}
    if scheduler := bundle.scheduler.non_default_settings():
        about["scheduler"] = scheduler
    return None, bundle, about


def add(result: dict, scored: dict) -> None:
    """Adds a score's rows to the result: lists of several scores are joined."""
    for name, value in scored.items():
        joined = isinstance(value, list) and name in result
        result[name] = result[name] + value if joined else value


def val_loss(config: ConfigDict, parts, mesh, params) -> dict:
    return {"val_loss": Validation(config, parts, mesh)(params)}


def digits(config: ConfigDict, parts, mesh, params) -> dict:
    """Scores of the recipe's single digits, pairs and numbers, seen and held out."""
    count = config.eval.pictures
    sample, sample_few = (
        functools.partial(sampler, params)
        for sampler in digit_samplers(config, parts, mesh)
    )
    scores, by_prompt = [], []

    def judge(name, sample, kind, split):
        scenes = digit_scenes.sample_scenes(kind, split, count)
        asked = [Asked(str(scene), name, scene) for scene in scenes]
        # Picture i is drawn from noise i, so that two checkpoints are compared on equal
        # noise.
        images = sample([question.prompt for question in asked], range(count))
        verdicts = digit_scenes.scorer(asked, images)
        scores.append(scorers.share_right(name, verdicts)._asdict())
        by_prompt.extend(scorers.prompts(asked, verdicts))

    # Kinds that the recipe never shows are not scored.
    kinds = [kind for kind, share in zip(KINDS, config.data.mix) if share > 0]
    for kind in kinds:
        name = digit_scenes.NAMES[kind]
        if kind == "single":
            judge(name, sample, kind, "train")
            continue
        judge(f"{name}, seen", sample, kind, "train")
        judge(f"{name}, held out", sample, kind, config.eval.split)
        steps = config.eval.few_steps
        judge(f"{name}, held out, {steps} steps", sample_few, kind, config.eval.split)
    for kind in kinds:
        # Sixteen captions, several pictures each: variety is a mean over pairs of
        # pictures.
        scenes = digit_scenes.sample_scenes(kind, "train", 16)
        row = {"name": f"variety of {digit_scenes.NAMES[kind]}", "n": len(scenes)}
        scores.append(row | {"score": digit_scenes.variety(sample, scenes)})
        sides = config.image.height, config.image.width
        if kind == "single":
            scores.append(digit_scenes.read_scans(*sides)._asdict())
        else:
            scores.append(digit_scenes.ceiling(*sides, kind, 1_000)._asdict())
    return {"scores": scores, "prompts": by_prompt}


def digit_samplers(
    config: ConfigDict, parts, mesh
) -> tuple[TrainedSampler, TrainedSampler]:
    """Samplers of config.sample.steps and config.eval.few_steps, not compiled."""
    if config.data.name != "digits":
        raise UserError(
            'config.eval.scores: "digits" scores pictures of digits, but'
            f' config.data.name = "{config.data.name}"; use other scores, or'
            " --config.data.name=digits"
        )
    few = config.copy_and_resolve_references()
    few.sample.steps = config.eval.few_steps
    usual, quick = (TrainedSampler(x, parts, mesh) for x in (config, few))
    quick.program = usual.program  # the number of steps is an argument of it
    return usual, quick


SCORES = {"val_loss": val_loss, "digits": digits}
SCORES |= picture_scores.SCORES | prompt_scores.SCORES


def lines(result: dict) -> list[str]:
    """What evaluate prints: the scores, then the validation loss by t."""
    rows = result.get("scores", [])
    wide = max((len(row["name"]) for row in rows), default=0)
    text = []
    for row in rows:
        span = f"  [{row['low']:.3f}, {row['high']:.3f}]" if "low" in row else " " * 16
        text.append(f"{row['name']:<{wide}}  {row['score']:8.3f}{span}  n={row['n']}")
    for name, value in result.get("val_loss", {}).items():
        text.append(f"validation {name}: {value:.4f}")
    return text
