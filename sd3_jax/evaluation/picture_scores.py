"""CLIP score, FID, KID, precision and recall of sampled pictures (paper, B.3).

Pictures are sampled once for all measures; only their features are kept. Each process
extracts features of its share of each batch.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import model_parts
from sd3_jax.distributed import processes, watchdog
from sd3_jax.errors import UserError
from sd3_jax.evaluation import (
    clip_score,
    feature_statistics,
    fid,
    kid,
    picture_features,
    reference_images,
    scorers,
)
from sd3_jax.evaluation.clip_embedder import Clip
from sd3_jax.evaluation.extractors import Extractor
from sd3_jax.evaluation.feature_statistics import About, Stored
from sd3_jax.evaluation.picture_features import Features
from sd3_jax.evaluation.precision_recall import precision_recall
from sd3_jax.reports.number_format import plural
from sd3_jax.sampling.job import row_batches, sampler

log = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
    """UserError, before anything is loaded or sampled, if a setting is missing."""
    names = set(config.eval.scores)
    if not names & set(NAMES):
        return
    compared = bool(names & set(COMPARED))
    if compared and config.eval.pictures < 2:
        raise UserError(
            f"config.eval.pictures = {config.eval.pictures}: must be at least 2 to"
            f" compute {', '.join(sorted(names & set(COMPARED)))}"
        )
    picture_features.check(config, scored="clip_score" in names, compared=compared)
    path = stored_at(config)
    reference_images.check(config, compared=compared and not path)
    if config.eval.statistics and not compared:
        raise UserError(
            f"config.eval.statistics = {config.eval.statistics}: statistics of real"
            f" pictures are used only with {', '.join(COMPARED)} in config.eval.scores"
        )
    if compared and path:
        if config.eval.statistics:
            raise UserError(
                f"config.eval.statistics = {config.eval.statistics}: must be empty,"
                f" because config.eval.real = {path} is already a file of statistics"
            )
        feature_statistics.load(path)


def score(config: ConfigDict, parts: model_parts.Parts | None, mesh: Mesh, params: Any):
    """Rows of the measures in config.eval.scores."""
    captions, extract, clip = measured(config)
    names = config.eval.scores
    # Before sampling: missing pictures should fail in minutes, not after hours.
    reference = references(config, extract, names) if extract is not None else None
    sample = sampler.sampler_for(config, parts, mesh, params)
    sampled, cosines = look(config, sample, captions, extract, clip, "fid" in names)
    rows = []
    if clip is not None:
        rows.append(scorers.mean("CLIP score", cosines).finite())
    for name in COMPARED:
        if name in names:
            rows += COMPARED[name](extract.name, reference, sampled)
    return {"scores": rows}


def measured(config: ConfigDict) -> tuple[list[str], Extractor | None, Clip | None]:
    """The captions; the extractor for measures that compare with real pictures, or
    None; and CLIP for the CLIP score, or None."""
    compared = set(config.eval.scores) & set(COMPARED)
    # CLIP may serve the score and the features; it is loaded once, and only if needed.
    loaded = cache(lambda: picture_features.load_clip(config))
    return (
        reference_images.captions(config),
        picture_features.extractor(config, loaded) if compared else None,
        loaded() if "clip_score" in config.eval.scores else None,
    )


def references(
    config: ConfigDict, extract: Extractor, names: Sequence[str]
) -> Features:
    """Features of the real pictures, or of their file; saved if the config says so."""
    about = About(
        extract.name, extract.fingerprint, config.image.height, config.image.width
    )
    if path := stored_at(config):
        stored = feature_statistics.load(path)
        # A user's function does not say its dimension before it has been called.
        dim = extract.dim or len(stored.statistics.mean)
        # Statistics must be of at least as many pictures as are sampled.
        least = config.eval.pictures
        feature_statistics.check(stored, about, dim, least=least, where=path)
        return Features(stored.features, stored.statistics)
    keep = config.eval.statistics
    features = map(extract, reference_images.mine(config, ROWS))
    gathered = picture_features.gather(features, summed=bool(keep) or "fid" in names)
    if len(gathered.rows) < 2:
        where = "config.eval.real" if config.eval.real else "config.data.held_out"
        raise UserError(
            f"{where}: {plural(len(gathered.rows), 'readable picture')}; at least 2 are"
            " needed"
        )
    if keep and jax.process_index() == 0:
        feature_statistics.save(keep, Stored(about, gathered.statistics, gathered.rows))
        log.info("wrote %s: statistics of %d pictures", keep, gathered.statistics.count)
    return gathered


def stored_at(config: ConfigDict) -> str:
    """The file of statistics that config.eval.real names, if it is one."""
    paths = tuple(config.eval.real)
    files = [path for path in paths if path.endswith(".npz")]
    if files and len(paths) > 1:
        raise UserError(
            f"config.eval.real = {', '.join(paths)}: expected one .npz of statistics,"
            " or pictures"
        )
    return files[0] if files else ""


def look(
    config: ConfigDict,
    sample: sampler.SampleCaptions,
    captions: list[str],
    extract: Extractor | None,
    clip: Any,
    summed: bool,
) -> tuple[Features | None, np.ndarray | None]:
    """Features of the sampled pictures, and cosines to their captions."""
    features, embedded, at = [], [], 0
    index, step = jax.process_index(), jax.process_count()
    numbers, size = range(len(captions)), config.sample.batch_size
    for images in row_batches.sample_in_batches(sample, captions, numbers, size):
        watchdog.expect("features of a batch of pictures", watchdog.LONG)
        shared_images, at = (
            images[picture_features.share(at, index, step)],
            at + len(images),
        )
        if extract is not None:
            features.append(extract(shared_images))
        if clip is not None:
            # CLIP's features are then the embeddings too, and are not computed twice.
            shared = extract is not None and extract.extract == clip.image
            embedded.append(features[-1] if shared else clip.image(shared_images))
    # Shares differ in size: the processes meet before the collectives below.
    processes.meet("picture_scores")
    sampled = (
        picture_features.gather(features, summed=summed)
        if extract is not None
        else None
    )
    if clip is None:
        return sampled, None
    # The captions of this process's share, in the order of its pictures.
    texts = clip.text(captions[index::step])
    pictures = np.concatenate([np.zeros((0, clip.dim), np.float32), *embedded])
    cosines = picture_features.everyones(clip_score.cosines(pictures, texts))
    return sampled, picture_features.interleaved(cosines)


# --- measures that compare with real pictures


def of_fid(name: str, reference: Features, sampled: Features) -> list[dict]:
    real, generated = reference.statistics, sampled.statistics
    # The covariance is singular then, and FID's bias in 1/n is large.
    if min(real.count, generated.count) <= len(generated.mean):
        message = (
            "FID of %d pictures against %d, of %d numbers each: too high, and to be"
        )
        message += " compared only between equal numbers of pictures"
        log.warning(message, generated.count, real.count, len(generated.mean))
    distance = fid.frechet(real, generated)
    row = {"name": f"FID, {name}", "score": distance, "n": generated.count}
    return [row | {"real": real.count}]


def of_kid(name: str, reference: Features, sampled: Features) -> list[dict]:
    estimate = kid.kid(reference.rows, sampled.rows)
    # Papers report KID times 1,000.
    row = {"name": f"KID x 1,000, {name}", "score": 1_000 * estimate.mean}
    more = {"std": 1_000 * estimate.std, "subset": estimate.size}
    return [row | {"n": len(sampled.rows), "real": len(reference.rows)} | more]


def of_precision_recall(
    name: str, reference: Features, sampled: Features
) -> list[dict]:
    """Of equally many real and sampled pictures, so that balls are of like sizes."""
    n = min(len(reference.rows), len(sampled.rows))
    shares = precision_recall(reference.rows[:n], sampled.rows[:n])
    row = partial(dict, n=n, real=n)
    return [
        row(name=f"{measure}, {name}", score=value)
        for measure, value in shares._asdict().items()
    ]


ROWS = 64  # real pictures at a time
COMPARED: dict[str, Callable] = {
    "fid": of_fid,
    "kid": of_kid,
    "precision_recall": of_precision_recall,
}
NAMES = ("clip_score", *COMPARED)
SCORES = dict.fromkeys(NAMES, score)
