"""Pictures and captions to shards of records, part by part, on every host at once.

    sd3-jax precompute --config=RECIPE --workdir=DIR --config.ingest.inputs=FOLDER \
        --config.encode.weights=RELEASED

A part of the input is one host's, from first to last, and counts once its file in
DIR/parts is there: a killed job, started again, does the parts that are not. What a
part becomes depends on nothing but the input and the settings.
"""

import json
import logging
import time
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

from sd3_jax.assembly import compatibility, encoder_identity, examples
from sd3_jax.config import validation
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.ingest import (
    captions,
    filters,
    input_changes,
    input_parts,
    intake,
    items,
    listing,
    prepare,
)
from sd3_jax.data.ingest.input_parts import Item, Part, Rejected
from sd3_jax.data.ingest.manifest import Manifest, PartWriter
from sd3_jax.data.ingest.prepare import Ready
from sd3_jax.data.record_header import REJECTED
from sd3_jax.data.records import BadRecord
from sd3_jax.data.shards import expand
from sd3_jax.distributed import lock, processes, sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import shown
from sd3_jax.monitoring.progress import Progress
from sd3_jax.sampling.bundle import TEXT
from sd3_jax.sampling.encoder import Encoder
from sd3_jax.tools.plan import storage

log = logging.getLogger(__name__)
WAITING = 2  # batches that are encoded and not yet written, at most
EVERY = 1.0  # seconds between two looks at what other hosts have done
# What a record is made by: with other values a job does not go on where it was.
MAKING = (
    *("seed", "ingest", "encode", "image", "text.length", "model.channels"),
    *("model.patch", "model.multipliers", "model.context_dim", "model.pooled_dim"),
    *("precompute.part", "precompute.only", "precompute.held_out"),
)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Leaves records/, parts/, manifest.json and rejected.jsonl in workdir."""
    workdir = epath.Path(workdir)
    if config.precompute.plan:
        if jax.process_index() == 0:
            print(planned(config, workdir))
        return
    with lock.held(workdir, "precompute"), processes.stopping() as stop:
        settings = prepare_settings(config)
        watchdog.expect("the plan of the input", None)
        plan: list[Part] = []  # process 0's
        add_plan = lambda: plan.extend(new_plan(config, workdir, settings))
        processes.first(add_plan, seconds=watchdog.LONG)
        if jax.process_index() == 0:
            print(f"buckets: {', '.join(map(aspect, settings.buckets))}")
        watchdog.expect("the encoders' weights", watchdog.LONG)
        work = new_work(config, settings)
        encoder = work.encoder
        made = made_by(config, encoder, listing.digest(sorted(settings.excluded)))
        prints = encoder.bundle.fingerprints() if encoder else {}
        first_todo = lambda: begin(config, workdir, made, plan, prints)
        todo = processes.first(first_todo, seconds=watchdog.LONG)
        parts = plan_of(workdir)
        manifest = Manifest(workdir, len(parts))
        convert_all(work, parts, todo, manifest, stop)
        wait_for_all(manifest, stop)
        watchdog.expect("the manifest", None)
        # Whether it was told to stop, hosts see one after the other: process 0 decides.
        conclude = lambda: None if stop() else finish(workdir, manifest, made, prints)
        processes.first(conclude, seconds=watchdog.LONG)
        if stop():
            done = len(manifest.done())
            log.info("told to stop: %d of %d parts are done", done, len(parts))
        processes.meet("precompute/end")


def aspect(bucket: Bucket) -> str:
    return f"{bucket} ({bucket.width / bucket.height:.2f})"


def convert_all(work, parts: list[Part], todo: list[int], manifest: Manifest, stop):
    """Every part that no other host has begun, one after the other."""
    size = lambda numbers: sum(parts[number].bytes for number in numbers)
    every = range(len(parts))
    done = size(set(every) - set(todo))
    first = jax.process_index() == 0
    with Progress("pictures", total=size(every), done=done, shown=first) as progress:
        for number in todo:
            if stop() or not processes.claim(f"precompute/{number}"):
                continue
            begun, cut = time.monotonic(), work.cut
            try:
                with PartWriter(manifest.workdir, number) as shards:
                    rejected, sources = work.convert(
                        parts[number], shards, progress, stop
                    )
            except Stopped:
                return
            about = shards.about() | {"source": parts[number].label}
            about |= {"cut": dict(work.cut - cut)}
            about |= {"seconds": round(time.monotonic() - begun, 3)}
            manifest.add(number, about, rejected, sources)
            if first:  # who alone shows it; a listing of all that is done
                progress.at(size(manifest.done()))


def new_work(config: ConfigDict, settings: prepare.Settings) -> "Work":
    """This host's, its encoders loaded; nothing is compiled or read yet."""
    # A host's own devices: none waits for another, and one that ends is not missed.
    mesh = sharding.make_mesh(**config.mesh, devices=jax.local_devices())
    return Work(config, encoder_of(config, mesh), mesh, settings)


def encoder_of(config: ConfigDict, mesh: Mesh) -> Encoder | None:
    """The encoders that config.precompute.only names, None for none of them; a recipe
    of pixels has none."""
    only = list(config.precompute.only)
    if not only or config.image.autoencoder == "pixels":
        return None
    if not config.encode.weights:
        raise UserError(
            'config.encode.weights = "": wanted a released model for'
            f" {', '.join(only)}; or --config.precompute.only= for records of pictures"
        )
    return examples.encoder(config, mesh, only, config.encode.form)


def made_by(
    config: ConfigDict, encoder: Encoder | None, exclusions: str
) -> dict[str, Any]:
    """The settings that make the records, and fingerprints of what they name."""
    values = dict(validation.leaves(config))
    made = {key: x for key, x in values.items() if compatibility.within(key, MAKING)}
    for key in "encode.weights", "encode.tokenizers", "ingest.exclude", "ingest.inputs":
        made.pop(key)  # where, not what
    made["excluded"] = exclusions
    made["weights"] = encoder.bundle.fingerprint() if encoder else ""
    return json.loads(json.dumps(made))


def new_plan(
    config: ConfigDict, workdir: epath.Path, settings: prepare.Settings
) -> list[Part]:
    """The parts of the input; a UserError if captions would be lost."""
    begun = (workdir / "plan.json").exists()
    known = [part.path for part in plan_of(workdir)] if begun else []
    parts = intake.plan_inputs(config, known=known, size=config.precompute.part)
    if not settings.uncaptioned and not begun:
        intake.require_captions(parts, settings.captions, prefix=settings.prefix)
    return list(map(located, parts))


def begin(
    config: ConfigDict,
    workdir: epath.Path,
    made: dict,
    parts: list[Part],
    prints: dict[str, str],
) -> list[int]:
    """The parts that are to be done, by number; the plan of these is written once, and
    the input compared with it when the job is started again.

    Shards of a part that was not finished are removed: it is done again.
    """
    path = workdir / "plan.json"
    plan = {"made_by": made, "parts": [part._asdict() for part in parts]}
    if path.exists():
        before = json.loads(path.read_text())["made_by"]
        # A key that only one has is of another version of this code.
        differ = [
            f"{key} was {before[key]}, is {made[key]}"
            for key in sorted(before.keys() & made.keys())
            if before[key] != made[key]
        ]
        if differ:
            raise UserError(
                f"{workdir} holds records that other settings made:"
                f" {'; '.join(differ)}. Give back the old ones, or another workdir"
            )
        planned = plan_of(workdir)
        known = {listing.resolved(part.path) for part in planned}
        paths = [path for one in config.ingest.inputs for path in expand(one)]
        now = set(map(listing.resolved, paths))
        if changed := sorted(known ^ now):
            raise UserError(
                f"config.ingest.inputs: {shown(changed[0], 200)}"
                f" {'is new' if changed[0] in now else 'is gone'}, of"
                f" {len(changed)} that differ from what {workdir} was planned for:"
                " wanted the same, or another workdir for what is new"
            )
        done = Manifest(workdir, len(planned)).done()
        if input_changes.require_same(workdir, planned, parts, done):
            write_whole(path, json.dumps(plan).encode())
    else:
        for name in ("parts", "records"):
            (workdir / name).mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(plan).encode())
    write_whole(workdir / encoder_identity.NAME, json.dumps(prints).encode())
    return Manifest(workdir, len(plan_of(workdir))).clear_unfinished()


def plan_of(workdir: epath.Path) -> list[Part]:
    plan = json.loads((workdir / "plan.json").read_text())
    return [located(Part(**part)) for part in plan["parts"]]


def located(part: Part) -> Part:
    """The part by an absolute path: a later run may start in another folder."""
    return part._replace(path=listing.absolute(part.path))


def prepare_settings(config: ConfigDict) -> prepare.Settings:
    """What is taken and how; a UserError names the key that makes no sense."""
    given, found = config.ingest, {}
    for key, parse in ("captions", captions.parse), ("filters", filters.parse):
        try:
            found[key] = parse(tuple(given[key]))
        except UserError as error:
            raise UserError(f"config.ingest.{key}: {error}") from None
    gone = {}
    for path in map(epath.Path, given.exclude):
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"config.ingest.exclude: {path}: {reason}") from None
        gone |= prepare.parse_exclusions(lines, f"config.ingest.exclude: {path}")
    return prepare.Settings(
        buckets=examples.table(config),
        excluded=gone,
        prefix=given.prefix,
        uncaptioned=given.uncaptioned == "keep",
        held_out=config.precompute.held_out,
        rejected=given.rejected,
        seed=config.seed,
        **found,
    )


class Stopped(Exception):
    """The job was told to stop: the part it was at is done again next time."""


class Work:
    """Parts of the input on this host: prepared in threads, encoded on its devices,
    written by a thread. A few batches wait between them, however large a part is."""

    def __init__(
        self, config: ConfigDict, encoder: Encoder | None, mesh: Mesh, settings
    ):
        self.config, self.encoder, self.settings = config.precompute, encoder, settings
        self.placed = sharding.batch_sharding(mesh)
        self.size = config.encode.rows * sharding.batch_shards(mesh)
        self.key = jax.random.key(config.seed)
        found = encoder.bundle.modules if encoder else {}
        self.pictures = "vae" in found
        self.texts = any(encoder.bundle.text_models) if encoder else False

    def convert(
        self, part: Part, shards: PartWriter, progress: Progress, stop: Callable
    ) -> tuple[list[Rejected], list[list]]:
        """Write a part's records; what was not taken, in order of source, and a row of
        `stale` for every item."""
        rejected, sources, writing = [], [], deque()
        with (
            ThreadPoolExecutor(self.config.threads) as readers,
            ThreadPoolExecutor(1) as writer,
        ):
            for batch in self.batches(part, readers, rejected, sources, progress):
                if stop():
                    raise Stopped
                watchdog.expect("a batch of records", watchdog.LONG)
                tensors = self.encode(batch)
                writing.append(writer.submit(write, shards, batch, tensors, rejected))
                if len(writing) > WAITING:
                    writing.popleft().result()
            for one in writing:
                one.result()
        watchdog.expect("a part's shards, written whole", watchdog.LONG)
        return sorted(rejected), sources

    def batches(
        self, part: Part, readers: ThreadPoolExecutor, rejected, sources, progress
    ) -> Iterator[list[Ready]]:
        """What is ready, by bucket; the last of each may be fewer."""
        of = defaultdict(list)
        place = epath.Path(part.path)
        folder = place if part.kind == "folder" else place.parent
        settings = self.settings._replace(folder=str(folder))
        ready = partial(prepared, settings=settings)
        items_ = input_parts.items(part)
        for made, row in intake.in_order(readers, ready, items_, self.ahead):
            sources.append(row)
            progress.add(things=1, bytes=made.bytes)
            if isinstance(made, Rejected):
                rejected.append(made)
                continue
            of[made.bucket].append(made)
            if len(of[made.bucket]) == self.size:
                yield of.pop(made.bucket)
        yield from (of[bucket] for bucket in sorted(of))

    @property
    def ahead(self) -> int:
        return 2 * self.config.threads

    @property
    def cut(self) -> Counter:
        """Captions of which an encoder has not read all, so far."""
        return Counter(self.encoder.cut if self.encoder else {})

    def encode(self, batch: list[Ready]) -> dict[str, Any]:
        """Tensors by name, of `size` rows, the last repeated: one program a bucket."""
        rows = [*batch, *batch[-1:] * (self.size - len(batch))]
        made = self.drawn(rows, [row.image for row in rows])
        if rows[0].rejected is not None:
            other = self.drawn(rows, [row.rejected for row in rows])
            made |= {REJECTED + name: x for name, x in other.items()}
        if self.texts:
            captions = [row.caption for row in batch]
            ids = self.encoder.tokenize(captions + [""] * (self.size - len(batch)))
            made |= self.encoder.text(jax.device_put(ids, self.placed))
        return made

    def drawn(self, rows: list[Ready], pictures: list[np.ndarray]) -> dict[str, Any]:
        """The rows' pictures, encoded if that is wished."""
        image = np.stack(pictures)
        if not self.pictures:
            return {"image": image}
        keys = None
        if self.encoder.form == "latents":  # drawn here, once
            keys = np.uint32([zlib.crc32(row.source.encode()) for row in rows])
            keys = jax.vmap(partial(jax.random.fold_in, self.key))(keys)
        return self.encoder.picture(*jax.device_put((image, keys), self.placed))


def prepared(
    item: Item | Rejected, settings: prepare.Settings
) -> tuple[Ready | Rejected, list]:
    """The item as it is encoded, or why it is not, and its row of `stale`."""
    sums = []

    def read() -> bytes:
        data = item.read()
        sums.append(zlib.crc32(data))
        return data

    watched = item if isinstance(item, Rejected) else item._replace(read=read)
    made = prepare.prepare(watched, settings)
    return made, input_changes.row(item, sums[0] if sums else None)


def write(shards: PartWriter, batch: list[Ready], tensors: dict, rejected: list):
    """A batch's rows to their shards; what came out not finite is rejected."""
    tensors = {name: np.asarray(x) for name, x in tensors.items()}
    for place, ready in enumerate(batch):
        try:
            shards.write(ready, {name: x[place] for name, x in tensors.items()})
        except BadRecord as error:
            reason = str(error).removeprefix(f"record of {ready.source!a}: ")
            reason = f"encoded to what no record holds: {reason}"
            rejected.append(items.rejected(ready.source, reason, ready.bytes))


def wait_for_all(manifest: Manifest, stop: Callable) -> None:
    """Until the others are done with their parts; the watch sees to one that ends."""
    watchdog.expect("the other hosts' parts", None)
    while len(manifest.done()) < manifest.parts and not stop():
        time.sleep(EVERY)


def finish(
    workdir: epath.Path, manifest: Manifest, made: dict, prints: dict[str, str]
) -> None:
    """manifest.json and rejected.jsonl, and what they say in short."""
    total = manifest.total()
    text = "".join(f"{line}\n" for line in manifest.rejected())
    write_whole(workdir / "rejected.jsonl", text.encode())
    about = total | {"made_by": made, "encoders": prints}
    write_whole(workdir / "manifest.json", json.dumps(about, indent=1).encode())
    print(*lines(total), f"{workdir}/manifest.json, {workdir}/records", sep="\n")
    if not total["records"]:
        reasons = [f"{count:,} {why}" for why, count in total["rejected"].items()]
        raise UserError(
            f"config.ingest: of {total['files']:,} files no record was made: rejected"
            f" {'; '.join(reasons[:3]) or 'none'}. {workdir}/rejected.jsonl names each;"
            f" put that right and give another workdir"
        )


def lines(total: dict) -> Iterator[str]:
    """What precompute prints at its end."""
    files, records = total["files"], total["records"]
    yield f"{files:,} files: {records:,} records, {files - records:,} rejected"
    wide = max(map(len, total["kept"]), default=0)
    for bucket, counts in total["kept"].items():
        by_split = ", ".join(f"{n:,} {split}" for split, n in counts.items() if n)
        yield f"  {bucket:>{wide}}  {by_split}"
    for reason, count in total["rejected"].items():
        yield f"  rejected {count:,}: {reason}"
    if total["rejected"].get(prepare.UNCAPTIONED):
        yield (
            "  pictures without a caption are taken as unconditional examples with"
            " --config.ingest.uncaptioned=keep; --config.ingest.prefix is one for all"
        )
    drawn = [f"{name} {n:,}" for name, n in total["captions"].items()]
    drawn += [f"none {total['uncaptioned']:,}"] * bool(total["uncaptioned"])
    yield f"  captions: {', '.join(drawn) or 'none'}"
    for encoder, count in total["cut"].items():
        yield f"  {encoder} does not read {count:,} captions to their end"


def planned(config: ConfigDict, workdir: epath.Path) -> str:
    """What the records of so many invented pictures would take."""
    encode, only = config.encode, config.precompute.only
    vae, text = "vae" in only, any(name in only for name in TEXT)
    plan = storage.plan(
        config.precompute.plan,
        buckets=examples.table(config),
        latents=("moments" if encode.form == "moments" else "sample")
        if vae
        else "image",
        latents_dtype=encode.latents_dtype,
        channels=config.model.channels,
        text_tokens=config.text.length if text else 0,
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
        text_dtype=encode.text_dtype,
        part=config.precompute.part,
        batch_size=config.data.batch_size,
        seed=config.seed,
    )
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plan._asdict(), indent=1, default=str)
    write_whole(workdir / "storage.json", text.encode())
    return plan.text()
