"""From a config to the examples of a run: their source, shapes and encoders."""

import functools
import logging
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import encoder_identity
from sd3_jax.config import validation
from sd3_jax.data import buckets, tokenizers
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.dataset import Records
from sd3_jax.data.digits import Digits
from sd3_jax.data.loader import Loader
from sd3_jax.data.record_header import REJECTED, TENSORS, TEXTS
from sd3_jax.data.records import Record
from sd3_jax.data.synthetic import Synthetic
from sd3_jax.errors import UserError, nearest
from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling.encoder import Encoder
from sd3_jax.sampling.prompts import CLIP_LENGTH

log = logging.getLogger(__name__)
# What a recipe can make latents of, the first that a record has.
PICTURES = {"pixels": ("image",), "latents": ("moments", "latents", "image")}


def source(config: ConfigDict, *, held_out: bool = False):
    """The training examples, or those set apart for validation.

    Making it looks at every shard of records, held out ones too, and at the first
    record: a UserError then, before anything is compiled.
    """
    if config.image.buckets > 1 and config.data.name in validation.READS:
        raise UserError(
            f"config.image.buckets = {config.image.buckets}: wanted 1, for config.data."
            f'name = "{config.data.name}" has pictures of one shape; or "records"'
        )
    seed = config.seed + (2**31 if held_out else 0)
    size = dict(height=config.image.height, width=config.image.width)
    if config.data.name == "digits":
        easy = 0 if held_out else config.data.easy
        mix = tuple(config.data.mix)
        return Digits(**size, mix=mix, easy=easy, seed=seed, held_out=held_out)
    if config.data.name == "synthetic":
        return Synthetic(
            **size,
            channels=config.model.channels,
            text_length=config.text.length,
            context_dim=config.model.context_dim,
            pooled_dim=config.model.pooled_dim,
            seed=seed,
            pairs=config.tune.objective == "dpo",
            sets=config.tune.prior > 0,
        )
    if config.data.name == "records":
        found = stored(config, held_out=held_out)
        if not held_out:
            check_held_out(config, found)
        return found
    raise UserError(
        f'config.data.name = "{config.data.name}"'
        f"{nearest(config.data.name, ('digits', 'synthetic', 'records'))}"
    )


def table(config: ConfigDict) -> tuple[Bucket, ...]:
    """The shapes of the recipe's pictures, in pixels."""
    image = config.image
    model = config.model
    unit = validation.unit(image.autoencoder, model.patch, model.multipliers)
    sides = image.height, image.width
    return buckets.table(*sides, count=image.buckets, aspect=image.aspect, unit=unit)


def shapes(config: ConfigDict, bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """Of all that a record may hold, the recipe's."""
    model, sides = config.model, (bucket.height // 8, bucket.width // 8)
    pictures = {
        "image": (*bucket, 3),
        "moments": (*sides, 2 * model.channels),
        "latents": (*sides, model.channels),
    }
    return {
        **pictures,
        **{REJECTED + name: shape for name, shape in pictures.items()},
        "clip": (CLIP_LENGTH, model.pooled_dim),
        "t5": (max(1, config.text.length - CLIP_LENGTH), model.context_dim),
        "context": (config.text.length, model.context_dim),
        "pooled": (model.pooled_dim,),
    }


def stored(config: ConfigDict, *, held_out: bool) -> Records:
    """Records of the recipe's shapes. A set may have fewer than its part of a batch,
    which repeats some then; but as many are held out as a validation is to see."""
    data, size = config.data, batch_size(config, held_out=held_out)
    key, paths, weights = "data.records", data.records, data.weights
    if held_out:
        key, paths, weights = "data.held_out", data.held_out, ()
    try:
        records = Records(
            tuple(paths),
            weights=tuple(weights),
            shapes={str(bucket): shapes(config, bucket) for bucket in table(config)},
            batch_size=size,
            bad_records=data.bad_records,
            seed=config.seed,
        )
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from None
    try:
        records.encoders = encoder_identity.of_records(records)
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from None
    if held_out and len(records) < (wanted := validated(config)):
        raise UserError(
            f"config.{key}: {', '.join(paths)}: {len(records)} records, wanted at least"
            f" {wanted} for validation by config.eval.examples ="
            f" {config.eval.examples}; hold out more, or set"
            f" --config.eval.examples={len(records)}"
        )
    tell_repeated(key, records, size)
    try:
        records.keep(fields(config, records.first))
    except UserError as error:
        raise UserError(f"config.{key}: {records.shards[0].path}: {error}") from None
    for name in records.example(records.buckets[0]):
        wanted, shape = (
            records.buckets[0].shapes[name],
            records.first.tensors[name].shape,
        )
        if shape != wanted:
            raise UserError(
                f"config.{key}: {records.shards[0].path}: {name} of {by_x(shape)}, the"
                f" recipe's are {by_x(wanted)}: {made(name, config, shape)}"
            )
    return records


def batch_size(config: ConfigDict, *, held_out: bool = False) -> int:
    """Of training, or of validation."""
    return (held_out and config.eval.batch_size) or config.data.batch_size


def validated(config: ConfigDict) -> int:
    """Examples that a validation sees: whole batches, or less than one."""
    size = batch_size(config, held_out=True)
    return min(config.eval.examples, max(1, config.eval.examples // size) * size)


def tell_repeated(key: str, source: Records, size: int) -> None:
    """Log which sets, of which buckets, fill their part of a batch by repetition."""
    for bucket in source.buckets:
        total = sum(one.weight for one in bucket.sets)
        for one in bucket.sets:
            part = math.ceil(size * one.weight / total - 1e-6)
            count = len(one.numbers)
            if count < part:
                log.warning(
                    "config.%s: %s%s: %d records for %d of a batch: at least %d repeat",
                    *(key, one.name, f", {bucket.name}" * bool(source.buckets[1:])),
                    *(count, part, part - count),
                )


def by_bucket(source) -> str:
    """ "48x64 31 %, 64x64 69 %": how often it is whose turn; "" if all are alike."""
    if not isinstance(source, Records) or len(source.buckets) == 1:
        return ""
    weights = {b.name: sum(s.weight for s in b.sets) for b in source.buckets}
    total = sum(weights.values())
    return ", ".join(f"{name} {x / total:.1%}" for name, x in weights.items())


def fields(config: ConfigDict, first: Record) -> list[str]:
    """What of records like the first a batch has: the nearest to what is trained on."""
    kind = config.image.autoencoder
    held = ", ".join(name for name in TENSORS if name in first.tensors)
    picture = next((x for x in PICTURES[kind] if x in first.tensors), None)
    if picture is None:
        raise UserError(
            f'its records hold {held}: config.image.autoencoder = "{kind}" wants'
            f" {' or '.join(PICTURES[kind])}"
        )
    more = ["set"] if config.tune.prior else []
    if config.tune.objective == "dpo":
        more += [REJECTED + picture]
        if more[-1] not in first.tensors:
            raise UserError(
                f'its records hold {held}: config.tune.objective = "dpo" wants'
                f" preferences, {picture} and {more[-1]}"
            )
    text = [name for name in TEXTS if name in first.tensors]
    if config.text.name != "precomputed" or not text:
        text = ["caption"]
    raw = picture == "image" and kind == "latents"
    if not config.encode.weights and (raw or to_encode(config, text)):
        what = "pictures" if raw else "captions"
        raise UserError(
            f"its records hold {held}: their {what} are not encoded; wanted"
            " config.encode.weights, a released model that has the encoders"
        )
    return [picture, *text, *more]


def to_encode(config: ConfigDict, fields: Sequence[str]) -> list[str]:
    """The parts of a released model that make of these fields what is trained on."""
    parts = []
    if "image" in fields and config.image.autoencoder == "latents":
        parts += ["vae"]
    if "caption" in fields and config.text.name == "precomputed":
        parts += [*bundles.TEXT]
    return parts


def encoder_of(config: ConfigDict, source, mesh: Mesh) -> Encoder | None:
    """What a source's batches are still to go through, if anything."""
    fields = source.fields if isinstance(source, Records) else ()
    parts = to_encode(config, fields)
    return encoder(config, mesh, parts) if parts else None


def encoder(
    config: ConfigDict, mesh: Mesh, only: list[str], form: str = "moments"
) -> Encoder:
    """config.encode's encoders over the mesh; a UserError if they are not the model's.

    A text encoder that the weights have not is zeros to the denoiser.
    """
    encode, model = config.encode, config.model
    bundle = bundles.load(
        encode.weights,
        mesh=mesh,
        dtype=encode.dtype,
        tokenizers_from=encode.tokenizers,
        only=only,
        quantize={"t5": config.quantize.t5},
    )
    if "vae" in only:
        has = bundle.part("vae").latent_channels, bundle.factor
        if has != (model.channels, 8):
            raise UserError(
                f"config.encode.weights = {encode.weights}: an autoencoder of {has[0]}"
                f" channels and {has[1]} pixels a latent; config.model.channels ="
                f" {model.channels}, wanted 8 pixels"
            )
    made = Encoder(
        bundle,
        form=form,
        latents_dtype=encode.latents_dtype,
        text_dtype=encode.text_dtype,
        length=config.text.length,
        context_dim=model.context_dim,
        pooled_dim=model.pooled_dim,
        rows=encode.rows,
    )
    if any(name in bundle.modules for name in bundles.TEXT):
        try:
            made.check()
        except (ValueError, TypeError) as error:
            raise UserError(
                f"config.encode.weights = {encode.weights}: text encoders that do not"
                f" fit config.model.context_dim = {model.context_dim} and pooled_dim ="
                f" {model.pooled_dim}: {error}"
            ) from error
    elif only != ["vae"]:
        raise UserError(f"config.encode.weights = {encode.weights}: no text encoder")
    return made


def made(name: str, config: ConfigDict, shape: tuple[int, ...]) -> str:
    """What makes the shape of the recipe, and what that of the records."""
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
    """Validation, if a run comes to it, has records, and training has none of them."""
    if not config.data.held_out:
        if config.train.eval_every > config.train.steps:
            return
        raise UserError(
            "config.data.held_out = (): wanted shards for validation, or config.train."
            f"eval_every over config.train.steps = {config.train.steps}"
        )
    files = {shard.file for shard in trained_on.shards}
    held_out = stored(config, held_out=True)
    if differences := encoder_identity.differing(
        trained_on.encoders, held_out.encoders
    ):
        raise UserError(
            "config.data.held_out: encoded by others than config.data.records:"
            f" {differences}; wanted records of one config.encode.weights and dtype"
        )
    for shard in held_out.shards:
        if shard.file in files:
            raise UserError(
                f"config.data.held_out: {shard.path} is one of config.data.records too"
            )


def loader(
    config: ConfigDict,
    rows: np.ndarray,
    *,
    start: int = 0,
    ahead: int = 0,
    made=None,
    encoder: Encoder | None = None,
    held_out: bool = False,
) -> Loader:
    """This process's rows; `made` is the source, if it has been made."""
    return Loader(
        made or source(config, held_out=held_out),
        batch_size=batch_size(config, held_out=held_out),
        rows=rows,
        tokenize=tokenizer(config, encoder),
        start=start,
        ahead=ahead,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


def nominal(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch of the recipe's size, in float32."""
    b, text = config.data.batch_size, config.text
    of = shapes(config, Bucket(config.image.height, config.image.width))
    pixels = config.image.autoencoder == "pixels"
    batch = {"image": np.uint8} if pixels else {"latents": np.float32}
    if config.tune.objective == "dpo":
        batch |= {REJECTED + name: dtype for name, dtype in batch.items()}
    if text.name != "bytes":
        batch |= {"context": np.float32, "pooled": np.float32}
    made = {k: jax.ShapeDtypeStruct((b, *of[k]), dtype) for k, dtype in batch.items()}
    if config.tune.prior:
        made["set"] = jax.ShapeDtypeStruct((b,), np.int32)
    if text.name == "bytes":
        made["ids_bytes"] = jax.ShapeDtypeStruct((b, text.length), np.int32)
    return made


def tokenizer(config: ConfigDict, encoder: Encoder | None) -> Callable:
    """From captions to a batch's ids."""
    if encoder is not None:
        return encoder.tokenize
    return functools.partial(tokenizers.bytes_of, length=config.text.length)


def batches(
    config: ConfigDict, source, encoder: Encoder | None = None
) -> list[dict[str, np.ndarray]]:
    """A batch of zeros of each bucket that the source has, as its loader gives them."""
    size = config.data.batch_size
    if not isinstance(source, Records):
        return [zeros(nominal(config))]
    captioned = "caption" in source.fields
    more = tokenizer(config, encoder)([""] * size) if captioned else {}
    more |= {"set": np.zeros(size, np.int32)} if "set" in source.fields else {}
    return [
        {
            name: np.zeros((size, *shape), dtype)
            for name, (shape, dtype) in source.example(bucket).items()
        }
        | more
        for bucket in source.buckets
    ]


def zeros(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    return {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
