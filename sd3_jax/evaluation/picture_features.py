"""Features of pictures that are shared among processes, gathered bit by bit."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from sd3_jax import hooks
from sd3_jax.errors import UserError, prefixed
from sd3_jax.evaluation import clip_embedder, extractors, feature_statistics
from sd3_jax.evaluation.clip_embedder import Clip
from sd3_jax.evaluation.extractors import Extractor
from sd3_jax.evaluation.feature_statistics import KEPT, Statistics
from sd3_jax.weights import sources


class Features(NamedTuple):
    """Features of all processes' pictures; `rows` are the first KEPT, in order."""

    rows: np.ndarray  # (n, d) float32
    statistics: Statistics | None  # of every one, where they are wanted


def check(config: ConfigDict, *, scored: bool, compared: bool) -> None:
    """UserError, before anything is sampled, if no extractor or no CLIP is named."""
    name = config.eval.features
    if name not in ("clip", "pixels") and not name.endswith(".pt") and ":" not in name:
        raise UserError(
            f'config.eval.features = "{name}": expected clip, pixels,'
            ' "package.module:function" or a TorchScript file of Inception, *.pt'
        )
    if (scored or (compared and name == "clip")) and not config.eval.clip:
        raise UserError(
            'config.eval.clip = "":'
            f" {'clip_score' if scored else 'config.eval.features = clip'} needs the"
            " weights of CLIP; set a folder with a CLIPModel of transformers, its"
            " .safetensors or a hub name, such as openai/clip-vit-large-patch14"
        )
    if config.eval.clip and (scored or name == "clip"):
        with prefixed("config.eval.clip"):
            sources.resolve(config.eval.clip, clip_embedder.WANTED)
    # A covariance takes numbers^2 float64s.
    numbers = 3 * config.image.height * config.image.width
    if (
        name == "pixels"
        and "fid" in config.eval.scores
        and numbers > feature_statistics.DIM
    ):
        raise UserError(
            f'config.eval.features = "pixels": {numbers} numbers a picture, but FID'
            f" takes at most {feature_statistics.DIM}; use smaller pictures or"
            " --config.eval.features=clip"
        )
    if compared and name.endswith(".pt") and not epath.Path(name).exists():
        raise UserError(f"config.eval.features = {name}: no such file")
    # Imported now, so that a typo in its name ends the job at once.
    if compared and ":" in name:
        hooks.guarded("eval.features", name)


def load_clip(config: ConfigDict) -> Clip:
    with prefixed("config.eval.clip"):
        return clip_embedder.load(
            config.eval.clip, tokenizers_from=config.tokenizers, rows=config.eval.rows
        )


def extractor(config: ConfigDict, loaded: Callable[[], Clip] | None) -> Extractor:
    """The extractor that config.eval.features names; only "clip" calls `loaded`."""
    name = config.eval.features
    if name == "pixels":
        return extractors.PIXELS
    if name == "clip":
        clip = loaded()
        return Extractor(name, clip.fingerprint, clip.image, clip.dim)
    if name.endswith(".pt"):
        return extractors.of_torchscript(name)
    # A user's function may say which weights it has; guarded() hides its attributes.
    fingerprint = str(getattr(hooks.load(name), "fingerprint", ""))
    return Extractor(name, fingerprint, hooks.guarded("eval.features", name))


def gather(parts: Iterable[np.ndarray], *, summed: bool) -> Features:
    """Gathers the features of all processes, each of which gives its own in parts.

    Feature i of all belongs to process i mod processes. Statistics are merged in
    float64 on the host, as devices compute in float32.
    """
    total, first_rows, left = None, [], -(-KEPT // jax.process_count())
    for part in parts:
        if summed:
            part_statistics = feature_statistics.of(part)
            total = (
                part_statistics
                if total is None
                else feature_statistics.merged(total, part_statistics)
            )
        first_rows.append(part[:left])
        left -= len(first_rows[-1])
    rows = np.concatenate(first_rows) if first_rows else np.zeros((0, 0), np.float32)
    every = everyones(rows)
    dim = max(x.shape[1] for x in every)
    # A process without pictures has (0, 0) features, which become (0, dim).
    whole = interleaved([x.reshape(-1, dim) for x in every])[:KEPT]
    if not summed:
        return Features(whole, None)
    # A process without pictures takes part in the collectives all the same.
    mine = feature_statistics.none(dim) if total is None else total
    # Field by field, so that each keeps its own dtype and shape.
    sums = zip(*(everyones(np.asarray(field)) for field in mine))
    statistics = (Statistics(int(count), *rest) for count, *rest in sums)
    return Features(whole, feature_statistics.summed(statistics))


# --- shares of processes


def share(start: int, index: int, count: int) -> slice:
    """The rows of process `index` in a batch that begins with row `start` of all."""
    # Picture i belongs to process i mod count, also across batch boundaries.
    return slice((index - start) % count, None, count)


def interleaved(every: list[np.ndarray]) -> np.ndarray:
    """All rows in order, row i from process i mod processes; the inverse of `share`.

    A process with fewer rows, because files were unreadable, drops out earlier.
    """
    # A stable sort by turn deals the rows out in rounds: 0 of each process, 1 of each,
    # ….
    turns = np.concatenate([np.arange(len(part)) for part in every])
    return np.concatenate(every)[np.argsort(turns, kind="stable")]


def everyones(x: np.ndarray) -> list[np.ndarray]:
    """The array of each process, by its index, bit by bit; shapes may differ."""
    if jax.process_count() == 1:
        return [x]
    # process_allgather wants equal shapes everywhere, so shapes are gathered first and
    # the arrays are padded as bytes.
    shape = np.zeros(8, np.int32)
    shape[: x.ndim + 1] = x.ndim, *x.shape
    shapes = [row[1 : 1 + row[0]] for row in multihost_utils.process_allgather(shape)]
    sizes = [int(np.prod(dims)) * x.itemsize for dims in shapes]
    raw = np.zeros(max(sizes), np.uint8)
    # (bytes,), padded to the largest process's size
    raw[: x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    gathered = multihost_utils.process_allgather(raw)  # bytes: no dtype is cast
    rows = [np.ascontiguousarray(row[:n]) for row, n in zip(gathered, sizes)]
    return [row.view(x.dtype).reshape(s) for row, s in zip(rows, shapes)]
