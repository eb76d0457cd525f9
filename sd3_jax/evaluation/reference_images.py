"""Captions to sample, and the real pictures that samples are compared with."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from ml_collections import ConfigDict

from sd3_jax.assembly import examples, record_shapes, stored_records
from sd3_jax.data import buckets, images
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.dataset import Records
from sd3_jax.data.ingest import input_parts, intake, items
from sd3_jax.data.ingest.input_parts import Rejected
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.errors import UserError, prefixed
from sd3_jax.pictures import to_uint8
from sd3_jax.sampling import bundle_loading
from sd3_jax.sampling.job import prompt_file

log = logging.getLogger(__name__)
SOURCES = "digits", "records"  # of examples with captions


def check(config: ConfigDict, *, compared: bool) -> None:
    """UserError if there are no captions or, if `compared`, no real pictures."""
    # Held-out records supply captions, real pictures or both.
    if not config.eval.prompts_file or (compared and not config.eval.real):
        held_out(config)
    if config.eval.prompts_file:
        captions(config)
    if compared and config.eval.real:
        planned(config)


def captions(config: ConfigDict) -> list[str]:
    """config.eval.pictures captions: the file's, repeated, or held-out ones."""
    count, path = config.eval.pictures, config.eval.prompts_file
    if path:
        texts = prompt_file.prompts(config, path, "eval.prompts_file")
        return list(itertools.islice(itertools.cycle(texts), count))
    return [caption for caption, _ in held_out(config)(np.arange(count), False)]


def mine(config: ConfigDict, rows: int) -> Iterator[np.ndarray]:
    """This process's share of the real pictures, u8 (n, height, width, 3), n <= rows.

    Picture i of all belongs to process i mod processes. They are those of
    config.eval.real, or the held-out examples. Unreadable pictures are counted.
    """
    sides = Bucket(config.image.height, config.image.width)
    if config.eval.real:
        pictures = of_paths(config, sides)
    else:
        share = slice(jax.process_index(), None, jax.process_count())
        indices = np.arange(config.eval.pictures)[share]
        pictures = (fitted(x, sides) for _, x in held_out(config)(indices, True))
    while batch := list(itertools.islice(pictures, rows)):
        watchdog.expect("features of real pictures", watchdog.LONG)
        yield np.stack(batch)


# --- held-out examples


def held_out(config: ConfigDict) -> Callable[[np.ndarray, bool], Iterator]:
    """A function (indices, pictures) → (caption, u8 picture or None) for each."""
    data = config.data
    if data.name not in SOURCES:
        raise UserError(
            f'config.data.name = "{data.name}": its examples have no captions or no'
            " pictures; set config.eval.prompts_file, and config.eval.real for FID"
        )
    if data.name == "digits":
        source = examples.source(config, held_out=True)
        return functools.partial(_digits, source)
    held_records = records(config)
    least = config.eval.pictures
    if len(held_records) < least:
        raise UserError(
            f"config.eval.pictures = {least} but config.data.held_out has"
            f" {len(held_records)} records; set"
            f" --config.eval.pictures={len(held_records)} or less, or hold out more"
        )
    return lambda indices, pictures: _records(config, held_records, indices, pictures)


def records(config: ConfigDict) -> Records:
    """The held-out records, one a step, so that all buckets follow each other."""
    if not config.data.held_out:
        raise UserError(
            "config.data.held_out = (): captions and pictures come from it; set shards"
            " of records, or set config.eval.prompts_file and config.eval.real"
        )
    table = record_shapes.bucket_table(config)
    shapes = {
        str(bucket): record_shapes.tensor_shapes(config, bucket) for bucket in table
    }
    with prefixed("config.data.held_out"):
        return Records(
            tuple(config.data.held_out),
            shapes=shapes,
            bad_records=config.data.bad_records,
            seed=config.seed,
        )


def _digits(source, indices, pictures: bool) -> Iterator:
    if not pictures:
        yield from ((str(scene), None) for scene in source.scenes(indices))
        return
    for start in range(0, len(indices), 64):
        batch = source.batch(indices[start : start + 64])
        yield from zip(batch["caption"], batch["image"])


def _records(config, held_records: Records, indices, pictures: bool) -> Iterator:
    kinds = stored_records.PICTURES["latents"]
    # Pictures themselves before latents.
    has = next((x for x in reversed(kinds) if x in held_records.first.tensors), "")
    if pictures and not has:
        raise UserError(
            "config.data.held_out: its records hold no pictures; set records that do,"
            " or config.eval.real"
        )
    # Other tensors of a record, such as encoded text, are not even decoded.
    held_records.select_fields(("caption", has) if pictures else ("caption",))
    rows = (held_records.batch(np.array([i])) for i in indices)
    if not pictures:
        yield from ((row["caption"][0], None) for row in rows)
    elif has == "image":
        yield from ((row["caption"][0], row[has][0]) for row in rows)
    else:
        decode = decoder(config)
        while group := list(itertools.islice(rows, config.encode.rows)):
            images = decode([row[has][0] for row in group])
            yield from zip((row["caption"][0] for row in group), images)


def decoder(config: ConfigDict) -> Callable[[list[np.ndarray]], Iterator[np.ndarray]]:
    """A function from stored latents or moments to u8 pictures, on local devices."""
    weights, rows = config.encode.weights, config.encode.rows
    if not weights:
        raise UserError(
            "config.data.held_out: its records hold latents and no pictures; set"
            " config.encode.weights to a released model whose autoencoder decodes them,"
            " or set config.eval.real"
        )
    # Local devices, because each process decodes other pictures at its own pace.
    devices = jax.local_devices()
    mesh = sharding.make_mesh(data=len(devices), fsdp=1, devices=devices)
    bundle = bundle_loading.load(
        weights, mesh=mesh, dtype=config.encode.dtype, only=("vae",)
    )
    channels = bundle.part("vae").latent_channels

    def decode(stored):
        # Records of different buckets follow each other; a batch needs one shape.
        for _, same in itertools.groupby(stored, lambda x: x.shape):
            x = np.stack(list(same)).astype(np.float32)[..., :channels]  # the mean
            count = len(x)
            # Padded to `rows`, so that a bucket has one compiled program.
            x = np.concatenate([x, np.repeat(x[:1], rows - count, axis=0)])
            decoded = np.asarray(bundle.decode(x), np.float32)[:count]
            yield from to_uint8(2 * decoded - 1)

    return decode


def fitted(picture: np.ndarray, sides: Bucket) -> np.ndarray:
    """The centre crop of a picture, resized (Lanczos) to the sampled size."""
    return buckets.cut(picture, buckets.fit(*picture.shape[:2], [sides]))


def planned(config: ConfigDict) -> list[input_parts.Part]:
    with prefixed("config.eval.real"):
        return input_parts.plan(config.eval.real)


# --- config.eval.real: files


def of_paths(config: ConfigDict, sides: Bucket) -> Iterator[np.ndarray]:
    every = itertools.chain.from_iterable(map(input_parts.items, planned(config)))
    # All processes list the files in one order and each takes every count-th.
    share = itertools.islice(every, jax.process_index(), None, jax.process_count())
    unread, taken = 0, 0
    with ThreadPoolExecutor(config.data.threads) as threads:
        look = lambda item: _read(item, sides)
        # Results come in order, however the threads finish: the first KEPT features
        # that a file of statistics holds are then the same in each run.
        for picture in intake.in_order(threads, look, share, 2 * config.data.threads):
            unread, taken = unread + (picture is None), taken + (picture is not None)
            if picture is not None:
                yield picture
    if unread:
        message = "config.eval.real: %d of %d files are not pictures"
        log.warning(message, unread, unread + taken)


def _read(item, sides: Bucket) -> np.ndarray | None:
    if isinstance(item, Rejected):
        return None
    try:
        return fitted(images.read(item.read()), sides)
    except (images.BadImage, items.BadItem):
        return None
