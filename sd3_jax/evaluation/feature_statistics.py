"""Mean and covariance of features, summed part by part and kept in a file."""

import functools
import io
import json
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Float64
from numpy import ndarray

from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import parse_json, shown

FORMAT = 1  # of the file
FIELDS = ("mean", "scatter", "features", "about")
DIM = 8_192  # of a covariance, which takes 0.5 GB then
KEPT = 50_000  # features that a file has beside the sums


class Statistics(NamedTuple):
    """The mean of `count` features, and their scatter matrix about the mean."""

    count: int
    mean: Float64[ndarray, " d"]
    scatter: Float64[ndarray, "d d"]

    @property
    def covariance(self) -> Float64[ndarray, "d d"]:
        """Unbiased, over count - 1 as numpy.cov; a UserError of fewer than two."""
        if self.count < 2:
            raise UserError(
                f"statistics of {self.count} features; at least 2 are needed"
            )
        return self.scatter / (self.count - 1)

    def __str__(self) -> str:
        return f"{self.count} features of {len(self.mean)} numbers"


class About(NamedTuple):
    """The extractor and picture size; statistics are comparable if these are equal."""

    extractor: str
    fingerprint: str  # of its weights, as Extractor has it
    height: int  # pixels, as the extractor got them
    width: int


class Stored(NamedTuple):
    about: About
    statistics: Statistics
    features: Float[ndarray, "n d"]  # the first KEPT of them


def none(dim: int) -> Statistics:
    return Statistics(0, np.zeros(dim), np.zeros((dim, dim)))


def of(features: Float[ndarray, "n d"]) -> Statistics:
    """Statistics of features, summed in float64 about their mean."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or x.shape[1] > DIM:
        raise UserError(f"features of shape {x.shape}; expected (n, d), d <= {DIM}")
    if len(x) == 0:
        return none(x.shape[1])
    # Two passes: E[x^2] - E[x]^2 loses the digits in which large means agree.
    mean = x.mean(0)
    return Statistics(len(x), mean, (x - mean).T @ (x - mean))


def merged(a: Statistics, b: Statistics) -> Statistics:
    """Statistics of the union of both sets (Chan, Golub and LeVeque 1979)."""
    if a.mean.shape != b.mean.shape:
        raise UserError(f"{a} and {b}: both must be features of one extractor")
    count = a.count + b.count
    if count == 0:
        return a
    # Chan's update: scatters add up, and so does the scatter between the two means.
    apart, share = b.mean - a.mean, b.count / count
    between = np.outer(apart, apart) * (a.count * share)
    return Statistics(count, a.mean + share * apart, a.scatter + b.scatter + between)


def summed(parts: Iterable[Statistics]) -> Statistics:
    """One or more merged, in their order."""
    return functools.reduce(merged, parts)


# --- files


def save(path: epath.PathLike, stored: Stored) -> None:
    """Writes an .npz atomically; KID and recall need the features in it."""
    stats = stored.statistics
    about = {"format": FORMAT, "count": stats.count, **stored.about._asdict()}
    # Serialized in memory and written at once, so that a killed job leaves no half
    # file.
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mean=stats.mean,
        scatter=stats.scatter,
        # Sums cannot give KID or recall, which compare single pictures.
        features=np.asarray(stored.features[:KEPT], np.float32),
        about=np.array(json.dumps(about)),
    )
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, buffer.getvalue())


def load(path: epath.PathLike) -> Stored:
    """Reads an .npz; UserError if it is incomplete. Pickles in it are not opened."""
    try:
        with epath.Path(path).open("rb") as file:
            with np.load(file, allow_pickle=False) as archive:
                return _checked({k: archive[k] for k in FIELDS if k in archive.files})
    except OSError as error:
        reason = error.strerror or "not an .npz"
        raise UserError(f"{path}: cannot be read: {shown(reason)}") from None
    except MemoryError:
        raise
    except Exception as error:  # what a damaged zip raises is of many kinds
        reason = shown(f"{error}", 200)
        wanted = "expected statistics that config.eval.statistics wrote"
        raise UserError(f"{path}: {reason}; {wanted}") from None


def _checked(arrays: dict[str, ndarray]) -> Stored:
    if missing := [name for name in FIELDS if name not in arrays]:
        raise ValueError(f"{', '.join(missing)} is missing")
    about = parse_json(str(arrays["about"][()]))
    if about.pop("format", None) != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    count, mean, scatter = about.pop("count"), arrays["mean"], arrays["scatter"]
    features, d = arrays["features"], mean.shape[-1]
    shapes = mean.shape, scatter.shape, features.shape[1:]
    if shapes != ((d,), (d, d), (d,)) or not isinstance(count, int) or count < 0:
        raise ValueError(f"shapes {shapes} and count {count} do not match")
    # A NaN in a file would only show as a FID of NaN, hours later.
    for x in (mean, scatter, features):
        if x.dtype.kind != "f" or not np.isfinite(x).all():
            raise ValueError("numbers that are not finite")
    stats = Statistics(count, mean.astype(np.float64), scatter.astype(np.float64))
    return Stored(About(**about), stats, features)


def check(stored: Stored, about: About, dim: int, *, least: int, where: str) -> None:
    """UserError if features of `about` with `dim` numbers are not comparable with the
    stored ones, or if these are of fewer than `least` pictures."""
    stored_about, stats = stored.about, stored.statistics
    pairs = {
        "the extractor": (stored_about.extractor, about.extractor),
        "the extractor's fingerprint": (stored_about.fingerprint, about.fingerprint),
        "pictures": tuple(f"{x.height} x {x.width}" for x in (stored_about, about)),
        "numbers a feature": (len(stats.mean), dim),
    }
    for quantity, (stored_value, wanted) in pairs.items():
        if stored_value != wanted:
            difference = f"{shown(str(stored_value), 100)}, expected {wanted}"
            raise UserError(
                f"{where}: {quantity}: {difference} as in this run; compute the"
                " statistics again"
            )
    if stats.count < least:
        raise UserError(f"{where}: {stats.count} pictures, expected {least} or more")
