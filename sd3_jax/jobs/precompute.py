"""Pictures and captions to shards of records, part by part, on every host at once.

    sd3-jax precompute --config=RECIPE --workdir=DIR --config.ingest.inputs=FOLDER \
        --config.encode.weights=RELEASED

One host does a part of the input from first to last. A part counts once its file in
DIR/parts exists, so a killed job that is started again does the others, and those whose
files are no longer as written. The records of a part depend only on the input and the
settings.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import examples, precompute_plan, record_shapes
from sd3_jax.assembly.part_encoder import PartEncoder, Stopped
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.ingest import listing, prepare
from sd3_jax.data.ingest.input_parts import Part
from sd3_jax.data.ingest.manifest import Manifest, PartWriter
from sd3_jax.distributed import lock, processes, sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.monitoring.progress import Progress
from sd3_jax.sampling.text.encoder import Encoder
from sd3_jax.tools.plan import storage

log = logging.getLogger(__name__)
POLL = 1.0  # seconds between two looks at what other hosts have done


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Write records/, parts/, manifest.json and rejected.jsonl in workdir."""
    workdir = epath.Path(workdir)
    with lock.held(workdir, "precompute"), processes.stopping() as stop:
        # --- plan the input, on process 0; a listing has no time limit
        settings = precompute_plan.ingest_settings(config)
        watchdog.expect("the plan of the input", None)
        plan: list[Part] = []  # stays empty on the other hosts
        add_parts = lambda: plan.extend(
            precompute_plan.plan_input(config, workdir, settings)
        )
        processes.first(add_parts, seconds=watchdog.LONG)
        if jax.process_index() == 0:
            print(f"buckets: {', '.join(map(aspect, settings.buckets))}")

        # --- load the encoders, whose fingerprints the plan compares
        watchdog.expect("the encoders' weights", watchdog.LONG)
        part_encoder = new_encoder(config, settings)
        encoder = part_encoder.encoder
        exclusions = listing.digest(sorted(settings.excluded))
        record_settings = precompute_plan.record_settings(config, encoder, exclusions)
        fingerprints = encoder.bundle.fingerprints() if encoder else {}

        # --- write the plan, or compare with it; every host reads the same file
        compare_plan = lambda: precompute_plan.remaining_parts(
            config, workdir, record_settings, plan, fingerprints
        )
        todo = processes.first(compare_plan, seconds=watchdog.LONG)
        parts = precompute_plan.read_plan(workdir)
        manifest = Manifest(workdir, len(parts))
        if jax.process_index() == 0:
            print(*storage_lines(config, part_encoder, parts), sep="\n")

        # --- convert parts until all are done
        convert_all(part_encoder, parts, todo, manifest, stop)
        # The watchdog ends this host if another is lost.
        watchdog.expect("the other hosts' parts", None)
        while len(manifest.done()) < manifest.parts and not stop():
            time.sleep(POLL)

        # --- sum up. Hosts notice a signal at different times: process 0 decides
        watchdog.expect("the manifest", None)
        conclude = lambda: finish(workdir, manifest, record_settings, fingerprints)
        processes.first(lambda: None if stop() else conclude(), seconds=watchdog.LONG)
        if stop():
            done = len(manifest.done())
            log.info(
                "stopping on request: %d of %d parts are done; run the same command to"
                " continue",
                done,
                len(parts),
            )
        processes.meet("precompute/end")


def aspect(bucket: Bucket) -> str:
    return f"{bucket} ({bucket.width / bucket.height:.2f})"


def convert_all(
    part_encoder: PartEncoder,
    parts: list[Part],
    todo: list[int],
    manifest: Manifest,
    stop: Callable[[], bool],
) -> None:
    """Convert the parts that no other host has claimed, one after the other."""
    size = lambda numbers: sum(parts[number].bytes for number in numbers)
    numbers = range(len(parts))
    done = size(set(numbers) - set(todo))
    first = jax.process_index() == 0
    with Progress("pictures", total=size(numbers), done=done, shown=first) as progress:
        for number in todo:
            if stop() or not processes.claim(f"precompute/{number}"):
                continue
            begun, truncated = time.monotonic(), part_encoder.cut
            try:
                with PartWriter(manifest.workdir, number) as shards:
                    rejected, sources = part_encoder.convert(
                        parts[number], shards, progress, stop
                    )
            except Stopped:
                return
            # All shards have their names by now: the part's file may say so.
            report = shards.about() | {"source": parts[number].label}
            report |= {"cut": dict(part_encoder.cut - truncated)}
            report |= {"seconds": round(time.monotonic() - begun, 3)}
            manifest.add(number, report, rejected, sources)
            if first:  # it shows the progress of all hosts, at a listing a part
                progress.at(size(manifest.done()))


def new_encoder(config: ConfigDict, settings: prepare.Settings) -> PartEncoder:
    """This host's converter with its encoders loaded; nothing is compiled or read."""
    # A mesh of the host's own devices: no collective makes one host wait for another,
    # each having parts of its own.
    mesh = sharding.make_mesh(**config.mesh, devices=jax.local_devices())
    return PartEncoder(config, encoder_of(config, mesh), mesh, settings)


def encoder_of(config: ConfigDict, mesh: Mesh) -> Encoder | None:
    """The encoders that config.precompute.only names; None if it names none, or for a
    recipe of pixels."""
    only = list(config.precompute.only)
    if not only or config.image.autoencoder == "pixels":
        return None
    if not config.encode.weights:
        raise UserError(
            f'config.encode.weights = "": {", ".join(only)} need a released model; set'
            " it, or --config.precompute.only= to store pictures as they are"
        )
    return examples.encoder(config, mesh, only, config.encode.form)


def finish(
    workdir: epath.Path,
    manifest: Manifest,
    record_settings: dict,
    fingerprints: dict[str, str],
) -> None:
    """Write rejected.jsonl and manifest.json, and print a summary."""
    total = manifest.total()
    text = "".join(f"{line}\n" for line in manifest.rejected())
    write_whole(workdir / "rejected.jsonl", text.encode())
    # manifest.json comes last: that it exists says that all is done.
    contents = total | {"made_by": record_settings, "encoders": fingerprints}
    write_whole(workdir / "manifest.json", json.dumps(contents, indent=1).encode())
    print(*lines(total), f"{workdir}/manifest.json, {workdir}/records", sep="\n")
    if not total["records"]:
        reasons = [f"{count:,} {why}" for why, count in total["rejected"].items()]
        raise UserError(
            f"config.ingest: no record was made of {total['files']:,} files: rejected"
            f" {'; '.join(reasons[:3]) or 'none'}. {workdir}/rejected.jsonl lists each;"
            " fix the cause and use another workdir"
        )


def lines(total: dict) -> Iterator[str]:
    """The lines that precompute prints at its end."""
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
        yield f"  {encoder} truncates {count:,} captions"


def storage_lines(
    config: ConfigDict, part_encoder: PartEncoder, parts: list[Part]
) -> Iterator[str]:
    """The lines on disk space that precompute prints before it reads a picture."""
    names = part_encoder.tensor_names
    layouts = [
        record_shapes.stored_tensors(config, bucket, names)
        for bucket in part_encoder.settings.buckets
    ]
    counts = [part.count for part in parts]
    return storage.lines(list(map(storage.tensor_bytes, layouts)), counts)
