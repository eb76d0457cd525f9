"""The line of a picture to repeat, read from the picture itself."""

import logging

from ml_collections import ConfigDict

from sd3_jax.config.validation import validate
from sd3_jax.errors import UserError, prefixed
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.bundle_loading import QUANTIZED
from sd3_jax.sampling.job import picture_lines
from sd3_jax.sampling.job.line_inputs import Looked
from sd3_jax.sampling.job.prompt_lines import (
    Line,
    read_fields,
)

log = logging.getLogger(__name__)
BATCH = 2**30  # pixels of a batch of a picture to repeat: 1024 of 1024 x 1024


def read_repeated(config: ConfigDict, path: str, looked: Looked) -> Line:
    """The line of the picture at `path`, with its place in its batch."""
    title = f"config.sample.from = {path}"
    line = picture_lines.read(path, title)
    if ("step" in line) == bool(config.weights):
        source = "a run's checkpoint" if "step" in line else "released weights"
        change = "remove" if "step" in line else "set"
        raise UserError(f"{title}: painted by {source}; {change} config.weights")
    # The recipe's pictures and cache are not the picture's: a setting that it lacks is
    # unset.
    config = config.copy_and_resolve_references()
    config.sample.update(image="", mask="", outpaint=(), resize="", crop_to_mask=-1)
    config.sample.update(cache="", cache_options="", cache_calibration="")
    # A seed of released weights is that of its line plus the number.
    shift = 0 if "step" in line else line["number"]
    fields = line["settings"] | {"seed": line["seed"] - shift}
    with prefixed(title):
        read = read_fields({"prompt": line["prompt"]} | fields, config, ".", looked)
    # Facts of the whole job, which the picture's line has beside its settings.
    facts = {"watermark": "", "lora": (), "embeddings": (), "step": 0}
    facts |= {name: line[name] for name in facts if name in line}
    with prefixed(title):
        _require_modest(line, read.config)
        for name, kind in line.get("quantize", {}).items():
            argument_checks.choice("quantize", name, list(config.quantize))
            argument_checks.choice(f"quantize.{name}", kind, QUANTIZED[name])
    if fields.get("cache") == "first_block" and line["batch"][1] > 1:
        # The others of its batch, which are not known, had a part in the decisions.
        message = "%s: its cache, first_block, skipped the steps of a whole batch of %d"
        log.warning(f"{message}: the picture may differ", path, line["batch"][1])
    try:
        kinds = dict.fromkeys(read.config.quantize, "") | line.get("quantize", {})
        files = {name: tuple(facts[name]) for name in ("lora", "embeddings")}
        read.config.sample.update(facts | files)
        read.config.quantize.update(kinds)
        read.config.sample.per_prompt = 1
        most = max(config.sample.batch_size, line["batch"][1])
        read.config.sample.batch_size = most
        validate(read.config)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{title}: {shown(error, 300)}") from None
    return read._replace(where=path, first=line["number"], slot=tuple(line["batch"]))


def _require_modest(line: dict, config: ConfigDict) -> None:
    """UserError for a batch that the sender of a picture made up."""
    size = line["batch"][1]
    pixels = size * config.image.height * config.image.width
    if pixels > BATCH:
        raise UserError(
            f"batch of {size} pictures, {pixels} pixels: expected at most {BATCH}"
        )


# --- lines of the file
