"""The encoders that made a run's records, as fingerprints of weights by part.

`precompute` writes them to encoders.json, `train` to its checkpoints. A model that
was trained on one autoencoder's latents cannot use another's.
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
from sd3_jax.sampling.text.encoder import Encoder

log = logging.getLogger(__name__)
NAME = "encoders.json"  # in precompute's workdir, beside records/
# Keys that a fingerprint depends on; declaring a change of any one of them is enough.
DECLARED = (
    *("data", "encode", "encode.weights", "encode.dtype"),
    *("quantize", "quantize.t5"),
)


def of_records(records: Records) -> dict[str, str]:
    """Read the fingerprints, by part ("vae", "clip_l", …), of the records' encoders.

    Nothing is known of shards that were moved away from their workdir. UserError if
    records of different encoders are mixed.
    """
    of_part: dict[str, tuple[str, str]] = {}
    folders = dict.fromkeys(os.path.dirname(shard.path) for shard in records.shards)
    for folder in folders:
        for part, fingerprint in _read(epath.Path(folder).parent).items():
            first, first_print = of_part.setdefault(part, (folder, fingerprint))
            if first_print != fingerprint:
                raise UserError(
                    f"{folder} was encoded by another {part} than {first}: fingerprints"
                    f" {fingerprint} and {first_print}. All records must have the same"
                    " config.encode.weights and dtype: precompute one of the two"
                    " folders again with the settings of the other"
                )
    return {part: fingerprint for part, (_, fingerprint) in of_part.items()}


def of_run(source: Any, encoder: Encoder | None) -> dict[str, str]:
    """Fingerprints of the encoders of its records and of those that encode the rest."""
    # What a run encodes itself counts over what is stored beside it.
    stored = source.encoders if isinstance(source, Records) else {}
    return stored | (encoder.bundle.fingerprints() if encoder else {})


def differing(saved: Mapping[str, str], current: Mapping[str, str]) -> str:
    """Describe the parts whose fingerprints differ; "" if none that both have does."""
    rows = [
        f"{part} had the fingerprint {saved[part]}, now {current[part]}"
        for part in saved
        if part in current and saved[part] != current[part]
    ]
    return ", ".join(rows)


def warn(
    config: ConfigDict, saved: Mapping[str, str], current: Mapping[str, str]
) -> None:
    """Warn of encoders other than those that a run was trained with."""
    if differences := differing(saved, current):
        words = "config.encode.weights = %s: the run was trained with others, or with"
        words += " another encode.dtype or quantize.t5: %s; pictures will be worse"
        log.warning(words, config.encode.weights, differences)


def warn_of_base(
    config: ConfigDict, saved: Mapping[str, str], current: Mapping[str, str]
) -> None:
    """Warn if records have other encoders than the run that this one starts from."""
    if differences := differing(saved, current):
        words = "config.tune.base = %s: was trained with other encoders: %s"
        log.warning(words, config.tune.base, differences)


def compare(
    where: Any, saved: Mapping[str, str], current: Mapping[str, str], config: ConfigDict
) -> None:
    """UserError if a resumed run has undeclared records of other encoders."""
    differences = differing(saved, current)
    if differences and not set(DECLARED) & set(config.train.changes):
        raise UserError(
            f"{where} was trained with other encoders: {differences}. Restore the old"
            " ones, or continue with these by --config.train.changes=data"
        )


def _read(workdir: epath.Path) -> dict[str, str]:
    path = workdir / NAME
    prints = files.read_object(path) if path.exists() else {}
    return {part: x for part, x in prints.items() if isinstance(x, str)}
