"""Which encoders made the records of a run: by part, as fingerprints of weights.

`precompute` leaves them in encoders.json and manifest.json, `train` in its checkpoints.
What was trained on one autoencoder's latents makes nonsense of another's.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sd3_jax import files
from sd3_jax.data.dataset import Records
from sd3_jax.errors import UserError
from sd3_jax.sampling.encoder import Encoder

log = logging.getLogger(__name__)
NAME = "encoders.json"  # in precompute's workdir, beside records/
# What a fingerprint depends on: to declare a change of one of these is enough.
DECLARED = (
    *("data", "encode", "encode.weights", "encode.dtype"),
    *("quantize", "quantize.t5"),
)


def of_records(records: Records) -> dict[str, str]:
    """Read the fingerprints by part ("vae", "clip_l", …) of what encoded these records.

    Shards that were moved away from their workdir say nothing. A UserError if records
    of different encoders are mixed.
    """
    of_part: dict[str, tuple[str, str]] = {}
    folders = dict.fromkeys(os.path.dirname(shard.path) for shard in records.shards)
    for folder in folders:
        for part, fingerprint in _read(epath.Path(folder).parent).items():
            first, known = of_part.setdefault(part, (folder, fingerprint))
            if known != fingerprint:
                raise UserError(
                    f"{folder} was encoded by another {part} than {first}: fingerprints"
                    f" {fingerprint} and {known}. Wanted records of one config.encode."
                    "weights and dtype: make one of them again with the other's"
                )
    return {part: fingerprint for part, (_, fingerprint) in of_part.items()}


def of_run(source: Any, encoder: Encoder | None) -> dict[str, str]:
    """Of the encoders that its records are of, and of those that encode the rest."""
    stored = source.encoders if isinstance(source, Records) else {}
    return stored | (encoder.bundle.fingerprints() if encoder else {})


def differing(known: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which parts are others than known; "" if none that both name."""
    rows = [
        f"{part} had the fingerprint {known[part]}, now {now[part]}"
        for part in known
        if part in now and known[part] != now[part]
    ]
    return ", ".join(rows)


def warn(config: ConfigDict, known: Mapping[str, str], encoder: Encoder) -> None:
    """Of encoders that are others than those that a run was trained with."""
    if known and (differences := differing(known, encoder.bundle.fingerprints())):
        words = "config.encode.weights = %s: the run was trained with others, or with"
        words += " another encode.dtype or quantize.t5: %s; pictures will be worse"
        log.warning(words, config.encode.weights, differences)


def warn_of_base(
    config: ConfigDict, known: Mapping[str, str], now: Mapping[str, str]
) -> None:
    """Of records that were encoded otherwise than those of the run they start from."""
    if differences := differing(known, now):
        words = "config.tune.base = %s: was trained with other encoders: %s"
        log.warning(words, config.tune.base, differences)


def compare(
    where: Any, saved: Mapping[str, str], now: Mapping[str, str], config: ConfigDict
) -> None:
    """UserError if a run goes on with what other encoders made, unless that is said."""
    differences = differing(saved, now)
    if differences and not set(DECLARED) & set(config.train.changes):
        raise UserError(
            f"{where} was trained with other encoders: {differences}. Bring those back,"
            " or go on with these and say so: --config.train.changes=data"
        )


def _read(workdir: epath.Path) -> dict[str, str]:
    for name, within in (NAME, None), ("manifest.json", "encoders"):
        if (workdir / name).exists():
            value = files.read_object(workdir / name)
            value = value.get(within, {}) if within else value
            if isinstance(value, dict):
                return {k: v for k, v in value.items() if isinstance(v, str)}
    return {}
