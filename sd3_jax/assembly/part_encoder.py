"""Convert a part of the input to records: prepare, encode and write it by batches."""

import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.data.ingest import input_changes, input_parts, intake, items, prepare
from sd3_jax.data.ingest.input_parts import Item, Part, Rejected
from sd3_jax.data.ingest.manifest import PartWriter
from sd3_jax.data.ingest.prepare import Ready
from sd3_jax.data.record_header import REJECTED
from sd3_jax.data.records import BadRecord
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.monitoring.progress import Progress
from sd3_jax.sampling.text.encoder import Encoder

WAITING = 2  # batches that are encoded and not yet written, at most


class Stopped(Exception):
    """The job was asked to stop; the part in progress is done again next time."""


class PartEncoder:
    """Converts parts of the input on this host.

    Threads read and prepare pictures, the host's devices encode them, and one thread
    writes. Only a few batches wait in between, however large a part is.
    """

    def __init__(
        self, config: ConfigDict, encoder: Encoder | None, mesh: Mesh, settings
    ):
        self.config, self.encoder, self.settings = config.precompute, encoder, settings
        self.placed = sharding.batch_sharding(mesh)
        self.size = config.encode.rows * sharding.batch_shards(mesh)
        self.key = jax.random.key(config.seed)
        modules = encoder.bundle.modules if encoder else {}
        self.pictures = "vae" in modules
        self.texts = any(encoder.bundle.text_models) if encoder else False

    def convert(
        self, part: Part, shards: PartWriter, progress: Progress, stop: Callable
    ) -> tuple[list[Rejected], list[list]]:
        """Write a part's records.

        Returns the rejected items in order of source, and for every item its row of
        `input_changes`.
        """
        rejected, sources, writing = [], [], deque()
        # A single writer: a shard's records stay in the order of the batches.
        with (
            ThreadPoolExecutor(self.config.threads) as readers,
            ThreadPoolExecutor(1) as writer,
        ):
            for batch in self.batches(part, readers, rejected, sources, progress):
                # Through PartWriter's exit, which removes the part's unfinished shards.
                if stop():
                    raise Stopped
                watchdog.expect("a batch of records", watchdog.LONG)
                tensors = self.encode(batch)
                writing.append(
                    writer.submit(write_batch, shards, batch, tensors, rejected)
                )
                # JAX dispatches without waiting: result() bounds what is in memory,
                # and raises here what failed in the writer's thread.
                if len(writing) > WAITING:
                    writing.popleft().result()
            for pending in writing:
                pending.result()
        watchdog.expect("a part's shards, written whole", watchdog.LONG)
        return sorted(rejected), sources

    def batches(
        self, part: Part, readers: ThreadPoolExecutor, rejected, sources, progress
    ) -> Iterator[list[Ready]]:
        """Batches of one bucket each; the last of a bucket may be smaller.

        Adds to `rejected` and `sources` as items pass.
        """
        by_bucket = defaultdict(list)
        path = epath.Path(part.path)
        folder = path if part.kind == "folder" else path.parent
        settings = self.settings._replace(folder=str(folder))
        prepare_one = partial(prepare_item, settings=settings)
        items_of_part = input_parts.items(part)
        # In the order of the input, whichever thread is first: a part that is done
        # again has the same records in the same order.
        ahead = 2 * self.config.threads
        outcomes = intake.in_order(readers, prepare_one, items_of_part, ahead)
        for outcome, row in outcomes:
            sources.append(row)
            progress.add(things=1, bytes=outcome.bytes)
            if isinstance(outcome, Rejected):
                rejected.append(outcome)
                continue
            by_bucket[outcome.bucket].append(outcome)
            if len(by_bucket[outcome.bucket]) == self.size:
                yield by_bucket.pop(outcome.bucket)
        yield from (by_bucket[bucket] for bucket in sorted(by_bucket))

    @property
    def tensor_names(self) -> list[str]:
        """The tensors of a record, as `encode` gives them."""
        names = [self.encoder.form if self.pictures else "image"]
        if self.settings.rejected:
            names.append(REJECTED + names[0])
        if self.texts:
            names += ["clip", "pooled"]
            names += ["t5"] * (self.encoder.bundle.text_models.t5 is not None)
        return names

    @property
    def cut(self) -> Counter:
        """Captions that were truncated so far, by encoder."""
        return Counter(self.encoder.cut if self.encoder else {})

    def encode(self, batch: list[Ready]) -> dict[str, Any]:
        """Tensors by name, of `size` rows; a short batch repeats its last row."""
        # A batch of another size would be another program: a compile for each, and
        # results that may round otherwise. Training fills its batches up likewise.
        rows = [*batch, *batch[-1:] * (self.size - len(batch))]
        tensors = self.encode_pictures(rows, [row.image for row in rows])
        if rows[0].rejected is not None:
            rejected_tensors = self.encode_pictures(
                rows, [row.rejected for row in rows]
            )
            tensors |= {REJECTED + name: x for name, x in rejected_tensors.items()}
        if self.texts:
            captions = [row.caption for row in batch]
            ids = self.encoder.tokenize(captions + [""] * (self.size - len(batch)))
            tensors |= self.encoder.text(jax.device_put(ids, self.placed))
        return tensors

    def encode_pictures(
        self, rows: list[Ready], pictures: list[np.ndarray]
    ) -> dict[str, Any]:
        """The rows' pictures in 8 bits, or encoded if the autoencoder is loaded."""
        image = np.stack(pictures)
        if not self.pictures:
            return {"image": image}
        keys = None
        # Latents are one draw for good. Its key is the picture's source, not its place
        # in a batch: the same on any host and with any number of rows.
        if self.encoder.form == "latents":
            keys = np.uint32([zlib.crc32(row.source.encode()) for row in rows])
            keys = jax.vmap(partial(jax.random.fold_in, self.key))(keys)
        return self.encoder.picture(*jax.device_put((image, keys), self.placed))


def prepare_item(
    item: Item | Rejected, settings: prepare.Settings
) -> tuple[Ready | Rejected, list]:
    """Prepare an item for encoding; also returns its row of `input_changes`."""
    # The checksum is of the bytes that are decoded: a second read for it would double
    # the traffic and might see another version of the file.
    checksums = []

    def read() -> bytes:
        data = item.read()
        checksums.append(zlib.crc32(data))
        return data

    observed = item if isinstance(item, Rejected) else item._replace(read=read)
    outcome = prepare.prepare(observed, settings)
    return outcome, input_changes.row(item, checksums[0] if checksums else None)


def write_batch(shards: PartWriter, batch: list[Ready], tensors: dict, rejected: list):
    """Write a batch's rows to their shards; reject those with values not finite."""
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    for index, ready in enumerate(batch):
        try:
            shards.write(ready, {name: x[index] for name, x in tensors.items()})
        except BadRecord as error:
            # `encode` names the record, as a Rejected does already.
            reason = str(error).removeprefix(f"record of {ready.source!a}: ")
            reason = f"the encoded values do not fit a record: {reason}"
            rejected.append(items.rejected(ready.source, reason, ready.bytes))
