"""Opening the records that config.data names, and checking that they fit the recipe."""

import logging
import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from sd3_jax.assembly import encoder_identity
from sd3_jax.assembly.record_shapes import bucket_table, tensor_shapes
from sd3_jax.data.dataset import Records
from sd3_jax.data.record_header import REJECTED, TENSORS, TEXTS
from sd3_jax.data.records import Record
from sd3_jax.errors import UserError, prefixed
from sd3_jax.sampling import bundle as bundles

log = logging.getLogger(__name__)
# The stored forms that a recipe can train on, best first: moments allow a new draw in
# every epoch, latents are one draw, and an image costs a pass of the autoencoder.
PICTURES = {"pixels": ("image",), "latents": ("moments", "latents", "image")}


def open_records(config: ConfigDict, *, held_out: bool) -> Records:
    """Open config.data.records, or held_out, as records of the recipe's shapes.

    A training set may be smaller than its share of a batch and then repeats within it.
    Held-out records must be as many as a validation reads.
    """
    data, size = config.data, batch_size(config, held_out=held_out)
    key, paths, weights = "data.records", data.records, data.weights
    if held_out:
        # Validation is one set: its mean loss is over examples, not over sets.
        key, paths, weights = "data.held_out", data.held_out, ()
    shapes = {str(x): tensor_shapes(config, x) for x in bucket_table(config)}
    with prefixed(f"config.{key}"):
        records = Records(
            tuple(paths),
            weights=tuple(weights),
            shapes=shapes,
            batch_size=size,
            bad_records=data.bad_records,
            seed=config.seed,
        )
        # Known from files beside the shards; a mixture of encoders is an error already.
        records.encoders = encoder_identity.of_records(records)
    if held_out and len(records) < (required := validated(config)):
        raise UserError(
            f"config.{key}: {', '.join(paths)}: the held-out set has {len(records)}"
            f" records but config.eval.examples = {config.eval.examples} needs"
            f" {required}; precompute with a larger --config.precompute.held_out, or"
            f" set --config.eval.examples={len(records)}"
        )
    warn_of_repeats(key, records, size)
    where = f"config.{key}: {records.shards[0].path}"
    with prefixed(where):
        records.select_fields(batch_fields(config, records.first))
    # The first record shows a wrong recipe. Every other record is checked for its
    # bucket's shapes when it is read.
    for name in records.example(records.buckets[0]):
        required = records.buckets[0].shapes[name]
        shape = records.first.tensors[name].shape
        if shape != required:
            raise UserError(
                f"{where}: {name} of {by_x(shape)}, the recipe's are {by_x(required)}:"
                f" {shape_advice(name, config, shape)}"
            )
    return records


def batch_size(config: ConfigDict, *, held_out: bool = False) -> int:
    """Examples in a batch of training, or of validation."""
    return (held_out and config.eval.batch_size) or config.data.batch_size


def validated(config: ConfigDict) -> int:
    """How many examples a validation reads: whole batches, or a part of one."""
    size = batch_size(config, held_out=True)
    return min(config.eval.examples, max(1, config.eval.examples // size) * size)


def warn_of_repeats(key: str, source: Records, size: int) -> None:
    """Warn of sets that repeat examples within a batch, in each bucket."""
    for bucket in source.buckets:
        of_bucket = f", {bucket.name}" * bool(source.buckets[1:])
        total = sum(mixed_set.weight for mixed_set in bucket.sets)
        for mixed_set in bucket.sets:
            # A set's share holds in every batch, rounded up at most; the tolerance
            # keeps errors of floats from adding an example.
            part = math.ceil(size * mixed_set.weight / total - 1e-6)
            count = len(mixed_set.numbers)
            if count < part:
                log.warning(
                    "config.%s: %s%s has %d records for %d places in a batch, so at"
                    " least %d repeat in it; use a smaller config.data.batch_size or"
                    " more records",
                    *(key, mixed_set.name, of_bucket),
                    *(count, part, part - count),
                )


def batch_fields(config: ConfigDict, first: Record) -> list[str]:
    """The fields of a batch: of each kind the stored form nearest to training's."""
    kind = config.image.autoencoder
    listed = ", ".join(name for name in TENSORS if name in first.tensors)
    picture = next((x for x in PICTURES[kind] if x in first.tensors), None)
    if picture is None:
        raise UserError(
            f'its records hold {listed}: config.image.autoencoder = "{kind}" needs'
            f" {' or '.join(PICTURES[kind])}"
        )
    extra = ["set"] if config.tune.prior else []
    if config.tune.objective == "dpo":
        extra += [REJECTED + picture]
        if extra[-1] not in first.tensors:
            raise UserError(
                f'its records hold {listed}: config.tune.objective = "dpo" needs'
                f" preferences, {picture} and {extra[-1]}"
            )
    # Captions count as encoded if any text encoder has been: what it lacks is zeros.
    text = [name for name in TEXTS if name in first.tensors]
    if config.text.name != "precomputed" or not text:
        text = ["caption"]
    # What is not stored encoded needs encoders while training.
    raw = picture == "image" and kind == "latents"
    if not config.encode.weights and (raw or to_encode(config, text)):
        unencoded = "pictures" if raw else "captions"
        raise UserError(
            f"its records hold {listed}: their {unencoded} are not encoded; set"
            " config.encode.weights to a released model that has the encoders"
        )
    return [picture, *text, *extra]


def to_encode(config: ConfigDict, fields: Sequence[str]) -> list[str]:
    """The parts of a released model that still have to encode these fields."""
    parts = []
    if "image" in fields and config.image.autoencoder == "latents":
        parts += ["vae"]
    if "caption" in fields and config.text.name == "precomputed":
        parts += [*bundles.TEXT]
    return parts


def shape_advice(name: str, config: ConfigDict, shape: tuple[int, ...]) -> str:
    """Which keys set the recipe's shape of a tensor, and what the records have."""
    model, image = config.model, config.image
    if name in ("context", "t5"):
        length, width = config.text.length, model.context_dim
        return f"config.text.length = {length}, config.model.context_dim = {width}"
    if name in ("clip", "pooled"):
        return f"config.model.pooled_dim = {model.pooled_dim}"
    factor = 1 if name == "image" else 8
    sides = by_x([factor * side for side in shape[:2]])
    return (
        f"config.image.height x width = {image.height} x {image.width}, config.image."
        f"buckets = {image.buckets}, config.model.channels = {model.channels}; the"
        f" records were made at {sides}"
    )


def by_x(shape) -> str:
    return " x ".join(map(str, shape))


def check_held_out(config: ConfigDict, trained_on: Records) -> None:
    """UserError if validation lacks records, or shares a shard or differs in encoders
    with training."""
    if not config.data.held_out:
        if config.train.eval_every > config.train.steps:
            return
        raise UserError(
            "config.data.held_out = (): validation needs held-out shards; set"
            " config.data.held_out, or set config.train.eval_every above"
            f" config.train.steps = {config.train.steps} for none"
        )
    # By identity of the file: two spellings of a path are one shard.
    files = {shard.file for shard in trained_on.shards}
    held_out = open_records(config, held_out=True)
    # A loss on another autoencoder's latents would say nothing.
    if differences := encoder_identity.differing(
        trained_on.encoders, held_out.encoders
    ):
        raise UserError(
            "config.data.held_out and config.data.records have different encoders:"
            f" {differences}; precompute both with one config.encode.weights and dtype"
        )
    for shard in held_out.shards:
        if shard.file in files:
            raise UserError(
                f"config.data.held_out: {shard.path} is in config.data.records too; a"
                " shard must be in one of them"
            )
