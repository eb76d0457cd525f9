"""Inspect shards of records: print a table, and write a page with some pictures.

    sd3-jax inspect --config=RECIPE --workdir=DIR [--config.data.records=SHARDS]

The shards are those of config.data, or else DIR/records/*.arecord, which `precompute`
wrote. By default a few records of each shard are read; config.inspect.records = 0 reads
all.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sd3_jax.data import shards
from sd3_jax.distributed import processes, sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import parse_json, shown
from sd3_jax.reports.number_format import gigabytes, plural
from sd3_jax.sampling import bundle_loading
from sd3_jax.tools.inspect import inspect_page, survey
from sd3_jax.tools.inspect.inspect_page import Contact
from sd3_jax.tools.inspect.survey import KINDS, WAIT, Choice, Tally, name_of

log = logging.getLogger(__name__)
FOLD = 50  # shards; with more, the table has a row a bucket
DECODED = 2**17  # latents of a picture, at most: 8 megapixels
MANIFEST = 2**28  # bytes of it, at most
HEAD = ("shard", "records", "MB", "bucket", "captions", "bad", "holds")


def run(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Print the table and write inspect.html; returns 1 if a record or shard is bad."""
    watchdog.expect("process 0, which inspects the records", WAIT)
    code = processes.first(lambda: inspected(config, epath.Path(workdir)), seconds=WAIT)
    watchdog.expect("the end", None)
    return code


def inspected(config: ConfigDict, workdir: epath.Path) -> int:
    """Inspect the shards on process 0; memory does not grow with what they hold."""
    paths, held_out = listed(config, workdir)
    choice = Choice(config.inspect.pictures)
    total, held_out_total = table(config, paths, held_out, choice)
    if total.reasons["not readable"] == total.shards:
        # No damage but another kind of file, or a path with a typo in it.
        raise UserError(
            f"none of the {plural(total.shards, 'file')} is a shard that can be read:"
            f" {total.bad[0]}; set config.data.records to shards of precompute"
        )
    notes = summary(total, held_out_total) + manifest(workdir)
    faults = verdict(total, config.inspect.records)
    rows = buckets(total)
    lines = [f"{a:>10} {n:>12} {x:>7.1%} {mb:>8} MB a record" for a, n, x, mb in rows]
    print("", *lines, "", *notes, *faults, sep="\n", flush=True)
    # After the table: the page may need weights, which may fail to load.
    decode, rendering = decoder(config)
    sheet = contacts(choice.chosen(), decode)
    text = page(config, workdir, total, notes, sheet, rendering)
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(workdir / "inspect.html", text.encode())
    print(workdir / "inspect.html")
    return int(total.bad_count > 0)


def listed(config: ConfigDict, workdir: epath.Path) -> tuple[list[str], set[str]]:
    """The shards' paths, and the set of those that config.data.held_out names."""
    data = config.data
    if data.records or data.held_out:
        trained = [path for pattern in data.records for path in shards.expand(pattern)]
        held_out = [
            path for pattern in data.held_out for path in shards.expand(pattern)
        ]
        # A shard that is listed in both is counted once.
        return list(dict.fromkeys(trained + held_out)), set(held_out)
    pattern = workdir / "records" / "*.arecord"
    try:
        return shards.expand(os.fspath(pattern)), set()
    except UserError as error:
        advice = "config.data.records, or the workdir of a precompute job"
        raise UserError(f"{error}; expected {advice}") from None


# --- what is printed


def table(
    config: ConfigDict, paths: list[str], held_out: set[str], choice: Choice
) -> tuple[Tally, Tally]:
    """Print a row as each shard is read; sums of all shards and of held-out ones."""
    each_shard = config.inspect.shards or len(paths) <= FOLD
    # Rows are printed before all are known: the width of names is taken up front.
    names = [name_of(path) for path in paths] if each_shard else ["1,000,000 shards"]
    wide = max(len(name) for name in (HEAD[0], *names))
    total, held_out_total, folded = Tally("all"), Tally("held out"), {}
    if not each_shard:
        print(f"{len(paths):,} shards, folded by bucket (--config.inspect.shards=true)")
    print(aligned(HEAD, wide))
    for path, tally in survey.tallies(paths, config.inspect.records, choice):
        total.add(tally)
        # Without config.data, precompute's name says so.
        if path in held_out or name_of(path).startswith("val-"):
            held_out_total.add(tally)
        if each_shard:
            print(aligned(cells(tally), wide), *reasons(tally), sep="\n", flush=True)
        else:
            bucket_name = tally.bucket()
            folded.setdefault(bucket_name, Tally(bucket_name)).add(tally)
    for bucket_name in sorted(folded, key=survey.sides):
        tally = folded[bucket_name]
        tally.name = plural(tally.shards, "shard")
        print(aligned(cells(tally), wide), *reasons(tally), sep="\n")
    return total, held_out_total


def aligned(row: tuple[str, ...], wide: int) -> str:
    """Format a row in columns; only its last cell has any length."""
    first, records, size, bucket, captions, bad, holds = row
    counts = f"{records:>10}  {size:>10}  {bucket:>12}  {captions:>8}  {bad:>5}"
    return f"{first:<{wide}}  {counts}  {holds}"


def cells(tally: Tally) -> tuple[str, ...]:
    holds = max(tally.holds, key=tally.holds.get, default="–")
    if len(tally.holds) > 1:
        holds += f" (and {plural(len(tally.holds) - 1, 'other kind')})"
    bucket = tally.bucket() if tally.good else "–"
    if len(tally.buckets) > 1:
        bucket += f" +{len(tally.buckets) - 1}"
    captions = f"{tally.captions / tally.good:.0%}" if tally.good else "–"
    counts = f"{tally.records:,}", f"{tally.bytes / 1e6:,.1f}"
    return tally.name, *counts, bucket, captions, f"{tally.bad_count:,}", holds


def reasons(tally: Tally) -> list[str]:
    if not tally.bad_count:
        return []
    counts = ", ".join(f"{k} {n:,}" for k, n in tally.reasons.most_common())
    return [f"  bad: {counts}"]


def buckets(total: Tally) -> list[tuple[str, str, float, str]]:
    """(bucket, records, their share, MB a record), tall buckets first."""
    return [
        (
            name,
            f"{round(n):,}",
            n / max(sum(total.buckets.values()), 1),
            f"{total.bucket_bytes[name] / n / 1e6:.3f}",
        )
        for name, n in sorted(total.buckets.items(), key=lambda x: survey.sides(x[0]))
    ]


def summary(total: Tally, held_out: Tally) -> list[str]:
    megabytes = total.bytes / max(total.records, 1) / 1e6
    size = f"{total.bytes / 1e9:,.2f} GB"
    notes = [
        f"{plural(total.records, 'record')} in {plural(total.shards, 'shard')}, {size},"
        f" {megabytes:.3f} MB a record"
    ]
    if held_out.shards:
        shards_ = plural(held_out.shards, "shard")
        notes.append(f"held out: {held_out.records:,} of these, in {shards_}")
    if total.good:
        text = f"with a caption: {total.captions / total.good:.0%}"
        if total.made_by:
            by = total.made_by.most_common()
            shares = [f"{shown(k)} {n / total.captions:.0%}" for k, n in by]
            text += f"; by where it is from: {', '.join(shares)}"
        notes.append(text)
    return notes


def verdict(total: Tally, limit: int) -> list[str]:
    if not total.bad_count:
        # Only what was read is known to be sound: each has had its checksum verified.
        if not limit:
            return [f"all {total.records:,} records are sound"]
        return [
            f"{total.good:,} of {total.records:,} records were read; all of these are"
            " sound"
        ]
    # Shards that cannot be opened are among the bad, but are not records.
    unread = total.reasons["not readable"]
    bad = total.bad_count - unread
    examined = total.good + bad
    lines = [f"{bad:,} of the {examined:,} records that were read are bad"]
    if unread:
        lines[0] += f"; {unread:,} of {total.shards:,} shards cannot be read"
    lines += [f"  {line}" for line in total.bad]
    if total.bad_count > len(total.bad):
        lines.append(f"  and {total.bad_count - len(total.bad):,} more")
    return lines


def manifest(workdir: epath.Path) -> list[str]:
    """Precompute's counts of records and rejected files; [] without manifest.json."""
    path = workdir / "manifest.json"
    try:
        with path.open("rb") as file:
            data = file.read(MANIFEST + 1)  # one byte more shows that it is too long
        counts = parse_json(data) if len(data) <= MANIFEST else None
    except OSError:
        return []
    except ValueError:
        counts = None
    if not isinstance(counts, dict):
        return [f"{path.name}: not a manifest"]
    notes = []
    if "kept" in counts:
        notes.append(f"kept {_sum(counts['kept']):,}")
    if "rejected" in counts:
        notes.append(f"rejected {_sum(counts['rejected']):,}")
        if isinstance(counts["rejected"], dict) and counts["rejected"]:
            reasons_ = Counter({k: _sum(n) for k, n in counts["rejected"].items()})
            listed = [f"{shown(k)} {n:,}" for k, n in reasons_.most_common(KINDS)]
            notes[-1] += f" ({', '.join(listed)})"
    return [f"{path.name}: {', '.join(notes)}"] if notes else []


# --- the page


def decoder(config: ConfigDict) -> tuple[Callable[[np.ndarray], Any] | None, str]:
    """A function from latents to pixels, or None; and how the page describes it."""
    # encode.weights made the latents, so their autoencoder suits as well.
    weights = config.weights or config.encode.weights
    if not weights:
        advice = "--config.encode.weights names the autoencoder that decodes them."
        return None, f"Latents are shown as a rough preview; {advice}"
    mesh = sharding.make_mesh(fsdp=1, devices=jax.local_devices()[:1])
    bundle = None

    # Loaded at the first latents: records of pictures need no autoencoder.
    def decode(x0):
        nonlocal bundle
        bundle = bundle or bundle_loading.load(
            weights,
            mesh=mesh,
            dtype=config.model.dtype,
            tokenizers_from=None,
            only=("vae",),
        )
        channels = bundle.part("vae").latent_channels
        if x0.shape[-1] != channels or math.prod(x0.shape[:2]) > DECODED:
            message = "%s decodes %d channels and %d positions at most; latents of"
            message += " shape %s are shown as a rough preview"
            log.warning(message, weights, channels, DECODED, x0.shape)
            return inspect_page.preview(x0)
        return bundle.decode(x0[None])[0]

    return decode, f"Images are as stored; latents are decoded by {weights}."


def contacts(places: list[tuple[str, int]], decode) -> list[Contact]:
    """Read the chosen records again, one at a time, and make their thumbnails."""
    sheet = []
    for path, index in places:
        watchdog.expect("a picture", watchdog.LONG)
        try:
            reader = shards.open_shard(path)
            record, size = survey.read(reader, path, index)
        except UserError as error:  # it was good a moment ago
            log.warning("%s", error)
            continue
        image = inspect_page.jpeg(inspect_page.picture(record, decode))
        # Without the tensors: only those of one record are in memory at a time.
        bucket, name = survey.bucket(record), f"{name_of(path)}:{index}"
        sheet.append(Contact(name, bucket, size, record._replace(tensors={}), image))
        reader.close()
    return sheet


def page(config, workdir, total: Tally, notes, sheet, rendering) -> str:
    megabytes = total.bytes / max(total.records, 1) / 1e6
    figures = [
        ("records", f"{total.records:,}", ""),
        ("on disk", *gigabytes(total.bytes)),
        ("per record", f"{megabytes:.3f}", "MB"),
        ("shards", f"{total.shards:,}", ""),
        ("read for this page", f"{total.good:,}", ""),
        ("bad", f"{total.bad_count:,}", ""),
    ]
    patterns = ", ".join([*config.data.records, *config.data.held_out])
    where = patterns or f"{workdir}/records"
    unlisted = total.bad_count - len(total.bad)
    bad = [*total.bad, *([f"and {unlisted:,} more"] if unlisted else [])]
    return inspect_page.html(
        where, figures, buckets(total), notes[1:], bad, sheet, rendering=rendering
    )


def _sum(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_sum, value.values()))
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
