"""Calibrations of MagCache: a model's curve of magnitude ratios, as a file of JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from sd3_jax import files
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks

# The number rises when the file's meaning changes; readers refuse others.
FORMAT = "sd3_jax step cache 1"
MOST = 1e6  # of a ratio; those of models are near 1
REMEDY = "calibrate it with sd3-jax calibrate"


class Calibration(NamedTuple):
    """The mean |residual i| / |residual i - 1| of each step i; that of step 0 is 1.

    `model` is the fingerprint of the denoiser's weights. `about` says how the curve was
    measured, for readers alone.
    """

    model: str
    ratios: Float[np.ndarray, " n"]
    about: Mapping[str, Any] = {}

    def require_model(self, fingerprint: str) -> None:
        """UserError if the curve is that of other weights."""
        if self.model != fingerprint:
            raise UserError(
                f"cache_calibration is of the weights {shown(self.model)}, but these"
                f" are {fingerprint}; {REMEDY}, in the dtype that you sample with"
            )


def mean(model: str, curves: Sequence[Float[np.ndarray, " n"]], **about) -> Calibration:
    """The calibration of several runs with as many steps."""
    # Curves differ little between prompts (Ma et al. 2025), so that a few suffice.
    return Calibration(model, np.mean(curves, axis=0, dtype=np.float32), about)


def write(path: epath.PathLike, calibration: Calibration) -> None:
    record = {"format": FORMAT, "model": calibration.model, **calibration.about}
    # Six digits are enough beside thresholds of about 0.1.
    record["ratios"] = [round(float(x), 6) for x in calibration.ratios]
    text = json.dumps(record, indent=1) + "\n"
    files.write_whole(path, text.encode())


def read(path: Any) -> Calibration:
    """The calibration in a file; UserError if it holds none."""
    name = argument_checks.path_text("cache_calibration", path, "a path")
    where = f"cache_calibration {shown(name)}"
    try:
        record = json.loads(epath.Path(name).read_text())
    except OSError as error:
        raise UserError(
            f"{where}: cannot be read: {error.strerror or error}; {REMEDY}"
        ) from None
    except (ValueError, RecursionError):  # the second of lists in lists in lists
        raise UserError(f"{where}: expected JSON; {REMEDY}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f'{where}: expected "format": "{FORMAT}"; {REMEDY}')
    ratios, model = record.get("ratios"), record.get("model")
    # json.loads also reads NaN and Infinity, which JSON does not have.
    # Not by numpy, which takes no whole number of JSON that exceeds 64 bits.
    number = lambda x: isinstance(x, int | float) and 0 <= x <= MOST
    if not isinstance(ratios, list) or not ratios or not all(map(number, ratios)):
        raise UserError(
            f"{where}: ratios: expected a list of numbers 0 to {MOST:g}, one a step"
        )
    if not isinstance(model, str):
        raise UserError(f"{where}: model: expected the fingerprint of its weights")
    about = {k: x for k, x in record.items() if k not in ("format", "model", "ratios")}
    return Calibration(model, np.array(ratios, np.float32), about)
