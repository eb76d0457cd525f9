"""What painted pictures are measured against: captions, and real pictures."""

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
from sd3_jax.errors import UserError
from sd3_jax.pictures import to_uint8
from sd3_jax.sampling import bundle as bundles
from sd3_jax.sampling import prompt_file

log = logging.getLogger(__name__)
SOURCES = "digits", "records"  # of examples with captions


def check(config: ConfigDict, *, compared: bool) -> None:
    """A UserError if there are no captions, or, to be `compared`, no real pictures."""
    if not config.eval.prompts_file or (compared and not config.eval.real):
        held_out(config)
    if config.eval.prompts_file:
        captions(config)
    if compared and config.eval.real:
        planned(config)


def captions(config: ConfigDict) -> list[str]:
    """config.eval.pictures of them: the file's, round and round, or held-out ones."""
    count, path = config.eval.pictures, config.eval.prompts_file
    if path:
        found = prompt_file.prompts(config, path, "eval.prompts_file")
        return list(itertools.islice(itertools.cycle(found), count))
    return [caption for caption, _ in held_out(config)(np.arange(count), False)]


def mine(config: ConfigDict, rows: int) -> Iterator[np.ndarray]:
    """This process's share of the real pictures, u8 (n, height, width, 3), n <= rows.

    Picture i of all is process i mod processes': of config.eval.real, or the held-out
    examples whose captions are painted. Those that cannot be read are counted.
    """
    sides = Bucket(config.image.height, config.image.width)
    if config.eval.real:
        found = of_paths(config, sides)
    else:
        share = slice(jax.process_index(), None, jax.process_count())
        indices = np.arange(config.eval.pictures)[share]
        found = (fitted(x, sides) for _, x in held_out(config)(indices, True))
    while some := list(itertools.islice(found, rows)):
        watchdog.expect("features of real pictures", watchdog.LONG)
        yield np.stack(some)


def held_out(config: ConfigDict) -> Callable[[np.ndarray, bool], Iterator]:
    """some(indices, pictures) gives (caption, u8 picture or None) of each example."""
    data = config.data
    if data.name not in SOURCES:
        raise UserError(
            f'config.data.name = "{data.name}": its examples have no captions or'
            " pictures: wanted config.eval.prompts_file, and config.eval.real for FID"
        )
    if data.name == "digits":
        source = examples.source(config, held_out=True)
        return functools.partial(_digits, source)
    found = records(config)
    least = config.eval.pictures
    if len(found) < least:
        raise UserError(
            f"config.eval.pictures = {least}: wanted at most {len(found)}, the records"
            " of config.data.held_out"
        )
    return lambda indices, pictures: _records(config, found, indices, pictures)


def records(config: ConfigDict) -> Records:
    """Those held out, one example a step: pictures of all buckets follow each other."""
    if not config.data.held_out:
        raise UserError(
            "config.data.held_out = (): wanted shards of records to take captions and"
            " pictures of, or config.eval.prompts_file and config.eval.real"
        )
    table = record_shapes.bucket_table(config)
    shapes = {
        str(bucket): record_shapes.tensor_shapes(config, bucket) for bucket in table
    }
    try:
        return Records(
            tuple(config.data.held_out),
            shapes=shapes,
            bad_records=config.data.bad_records,
            seed=config.seed,
        )
    except UserError as error:
        raise UserError(f"config.data.held_out: {error}") from None


def _digits(source, indices, pictures: bool) -> Iterator:
    if not pictures:
        yield from ((str(scene), None) for scene in source.scenes(indices))
        return
    for start in range(0, len(indices), 64):
        batch = source.batch(indices[start : start + 64])
        yield from zip(batch["caption"], batch["image"])


def _records(config, found: Records, indices, pictures: bool) -> Iterator:
    kinds = stored_records.PICTURES["latents"][
        ::-1
    ]  # pictures themselves before latents
    has = next((name for name in kinds if name in found.first.tensors), "")
    if pictures and not has:
        raise UserError(
            "config.data.held_out: its records hold no pictures; wanted some that do,"
            " or config.eval.real"
        )
    found.select_fields(("caption", has) if pictures else ("caption",))
    rows = (found.batch(np.array([i])) for i in indices)
    if not pictures:
        yield from ((row["caption"][0], None) for row in rows)
    elif has == "image":
        yield from ((row["caption"][0], row[has][0]) for row in rows)
    else:
        decode = decoder(config)
        while some := list(itertools.islice(rows, config.encode.rows)):
            images = decode([row[has][0] for row in some])
            yield from zip((row["caption"][0] for row in some), images)


def decoder(config: ConfigDict) -> Callable[[list[np.ndarray]], Iterator[np.ndarray]]:
    """Stored latents or moments to u8 pictures, on this process's devices alone."""
    weights, rows = config.encode.weights, config.encode.rows
    if not weights:
        raise UserError(
            "config.data.held_out: its records hold latents and no pictures: wanted"
            " config.encode.weights, a released model whose autoencoder decodes them,"
            " or config.eval.real"
        )
    devices = jax.local_devices()
    mesh = sharding.make_mesh(data=len(devices), fsdp=1, devices=devices)
    bundle = bundles.load(weights, mesh=mesh, dtype=config.encode.dtype, only=("vae",))
    channels = bundle.part("vae").latent_channels

    def decode(stored):
        for _, same in itertools.groupby(stored, lambda x: x.shape):
            x = np.stack(list(same)).astype(np.float32)[..., :channels]  # the mean
            count = len(x)
            x = np.concatenate([x, np.repeat(x[:1], rows - count, axis=0)])
            made = np.asarray(bundle.decode(x), np.float32)[:count]
            yield from to_uint8(2 * made - 1)

    return decode


def fitted(picture: np.ndarray, sides: Bucket) -> np.ndarray:
    """The middle of the picture, resized (Lanczos) to what is painted."""
    return buckets.cut(picture, buckets.fit(*picture.shape[:2], [sides]))


def planned(config: ConfigDict) -> list[input_parts.Part]:
    try:
        return input_parts.plan(config.eval.real)
    except UserError as error:
        raise UserError(f"config.eval.real: {error}") from None


def of_paths(config: ConfigDict, sides: Bucket) -> Iterator[np.ndarray]:
    every = itertools.chain.from_iterable(map(input_parts.items, planned(config)))
    share = itertools.islice(every, jax.process_index(), None, jax.process_count())
    unread, taken = 0, 0
    with ThreadPoolExecutor(config.data.threads) as threads:
        look = lambda item: _read(item, sides)
        for found in intake.in_order(threads, look, share, 2 * config.data.threads):
            unread, taken = unread + (found is None), taken + (found is not None)
            if found is not None:
                yield found
    if unread:
        told = "config.eval.real: %d of %d files are no pictures and are passed over"
        log.warning(told, unread, unread + taken)


def _read(item, sides: Bucket) -> np.ndarray | None:
    if isinstance(item, Rejected):
        return None
    try:
        return fitted(images.read(item.read()), sides)
    except (images.BadImage, items.BadItem):
        return None
