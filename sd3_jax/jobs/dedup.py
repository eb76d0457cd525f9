"""Find near-duplicates among the input's pictures, for precompute to leave out.

    sd3-jax dedup --config=RECIPE --workdir=DIR --config.ingest.inputs=FOLDER
    sd3-jax precompute ... --config.ingest.exclude=DIR/duplicates.jsonl

After the SD3 paper's appendix E.2 and E.3. Of similar pictures the one with most pixels
is kept, and of several such the largest file. An enlarged copy is therefore kept and
its original removed. Memory holds a fingerprint of each picture, not the pictures.
Process 0 does the work, in config.dedup.threads threads.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from numpy import ndarray

from sd3_jax import hooks
from sd3_jax.data import images
from sd3_jax.data.ingest import input_parts, intake, items, prepare
from sd3_jax.data.ingest.input_parts import Part, Rejected
from sd3_jax.distributed import lock, processes, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.monitoring.progress import Progress
from sd3_jax.tools.dedup import dedup_page, duplicates, embeddings, fingerprints
from sd3_jax.tools.dedup.fingerprints import Prints

PAPER = 0.5  # cosine of SSCD in the paper, and the default of other embeddings
# Pairs up to this far below the threshold are searched as well: the page shows what the
# threshold just spares.
MARGIN = 0.05
PAIRS = 1024  # that a thread compares at once
DAYS = 7  # that other processes wait


class Pictures(NamedTuple):
    """The readable pictures, most pixels first, then largest file first."""

    sources: list[str]
    parts: list[int]  # of the plan, by number
    pixels: ndarray  # (n,)
    compared: Prints | ndarray  # fingerprints, or embeddings (n, d)


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Write duplicates.jsonl, dedup.json and duplicates.html in workdir."""
    workdir = epath.Path(workdir)
    watchdog.expect("a search for near-duplicates, by process 0", None)
    with lock.held(workdir, "dedup"):
        if jax.process_index() == 0:
            dedup(config, workdir)
        processes.meet("dedup/end", minutes=DAYS * 24 * 60)


def dedup(config: ConfigDict, workdir: epath.Path) -> None:
    """Find the duplicates and write them, a page of pairs and a summary."""
    settings, clock = config.dedup, Clock()
    embed, threshold = embedding(settings.embed)
    threshold = settings.threshold or threshold
    parts = intake.plan_inputs(config)

    # --- fingerprints, compared with each other
    pictures, unread = read_all(parts, embed, settings)
    clock.lap("read")
    options = dict(clusters=settings.clusters, probes=settings.probes)
    pairs, alike = candidates(
        pictures.compared, threshold, clock, settings.threads, options
    )

    # --- which go. Pictures are sorted by preference, so their index is their rank
    near, n = alike >= threshold, len(pictures.sources)
    removed = duplicates.choose(n, pairs[near], alike[near], np.arange(n))
    clock.lap("choose")
    report = {
        "pictures": n,
        "unreadable": dict(sorted(unread.items())),
        "pairs": int(near.sum()),
        "removed": len(removed),
        "settings": settings.to_dict()
        | {"threshold": threshold, "inputs": list(config.ingest.inputs)},
    }
    # What precompute needs comes first; the page reads pictures again, and may fail.
    write(workdir, pictures.sources, removed)

    # --- the page
    shown = dedup_page.spread(alike, threshold, settings.pairs)
    examples = shots(parts, pictures, pairs[shown])
    clock.lap("page")
    report["seconds"] = clock.seconds
    rows = zip(pairs[shown].tolist(), alike[shown].tolist())
    rows = [(*map(examples.get, pair), value) for pair, value in rows]
    page = dedup_page.html(report, alike, threshold, rows)
    write_whole(workdir / "duplicates.html", page.encode())
    write_whole(workdir / "dedup.json", json.dumps(report, indent=1).encode())
    print(*lines(report), f"{workdir}/duplicates.jsonl, duplicates.html", sep="\n")


class Clock:
    """Measures the seconds of each stage."""

    def __init__(self):
        self.seconds, self._since = {}, time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage], self._since = round(now - self._since, 2), now


def embedding(name: str) -> tuple[Callable | None, float]:
    """The embedding of config.dedup.embed, None for the hash, and its threshold."""
    if name == "hash":
        return None, fingerprints.THRESHOLD
    if name.endswith(".pt"):
        return embeddings.SSCD(name), PAPER
    if ":" in name:
        return partial(embeddings.embedded, hooks.load(name), name=name), PAPER
    raise UserError(
        f'config.dedup.embed = "{name}": expected "hash", "package.module:function" or'
        " a"
        " TorchScript file of SSCD's, *.pt"
    )


def read_all(
    parts: Sequence[Part], embed: Callable | None, settings: ConfigDict
) -> tuple[Pictures, Counter[str]]:
    """Read and fingerprint every picture; also counts unreadable ones by reason."""
    unread, rows, batches = Counter(), [], []
    total = sum(part.bytes for part in parts)
    numbered_items = chain.from_iterable(
        ((number, item) for item in input_parts.items(part))
        for number, part in enumerate(parts)
    )
    look, join = partial(read, printed=embed is None), fingerprints.joined
    with (
        ThreadPoolExecutor(settings.threads) as threads,
        Progress("pictures", total=total) as progress,
    ):
        outcomes = intake.in_order(threads, look, numbered_items, 2 * settings.threads)
        readable_pictures = readable(outcomes, unread, rows, progress)
        while batch := list(islice(readable_pictures, settings.batch_size)):
            batches.append(join(batch) if embed is None else embed(batch))
    if embed is None:
        compared = join(batches)
    else:
        compared = np.concatenate(batches or [np.zeros((0, 1), np.float32)])
    pixels, size = np.array([row[2:] for row in rows], np.int64).reshape(-1, 2).T
    # Most pixels first; of equals the largest file, which is the least compressed. The
    # sort is stable, so ties keep the order of the input.
    order = np.lexsort((-size, -pixels))
    reorder = lambda prints: Prints(*(x[order] for x in prints))
    compared = reorder(compared) if embed is None else compared[order]
    sources, numbers = ([rows[i][k] for i in order] for k in (0, 1))
    return Pictures(sources, numbers, pixels[order], compared), unread


def read(numbered_item, *, printed: bool):
    """(item or Rejected, number of its part, pixels, fingerprint or picture)."""
    # Fingerprints are made here, in many threads. Embeddings want batches, in one.
    number, item = numbered_item
    if isinstance(item, Rejected):
        return item, number, 0, None
    try:
        picture = images.read(item.read())
    except (images.BadImage, items.BadItem) as error:
        reason = prepare.fault_kind(error)
        return items.rejected(item.source, reason, item.bytes), number, 0, None
    size = picture.shape[0] * picture.shape[1]
    comparable = fingerprints.prints([picture]) if printed else picture
    # Without `read`, which for a parquet file holds the picture's bytes.
    return item._replace(read=None), number, size, comparable


def readable(outcomes, unread: Counter, rows: list, progress: Progress) -> Iterator:
    """Yield what could be read and add its (source, part, pixels, bytes) to `rows`;
    count the others in `unread`, by reason."""
    for item, number, size, comparable in outcomes:
        progress.add(things=1, bytes=item.bytes)
        if isinstance(item, Rejected):
            unread[prepare.reason_kind(item.reason)] += 1
            continue
        rows.append((item.source, number, size, item.bytes))
        yield comparable


def candidates(
    compared: Prints | ndarray,
    threshold: float,
    clock: Clock,
    threads: int,
    options: dict,
) -> tuple[ndarray, ndarray]:
    """Pairs and their similarity: all above the threshold, and some below it."""
    if not isinstance(compared, Prints):
        lowest = threshold - MARGIN
        candidate_pairs = duplicates.pairs(compared, threshold=lowest, **options)
        clock.lap("search")
        return candidate_pairs
    # The hash searches in two steps: descriptors find pairs cheaply and loosely, and
    # only these are laid over each other.
    loose = fingerprints.LOOSE
    pairs, _ = duplicates.pairs(compared.descriptors, threshold=loose, **options)
    clock.lap("search")
    with ThreadPoolExecutor(threads) as pool:
        blocks = [pairs[at : at + PAIRS] for at in range(0, len(pairs), PAIRS)]
        likenesses = list(pool.map(partial(fingerprints.likeness, compared), blocks))
    clock.lap("compare")
    return pairs, np.concatenate([np.zeros(0, np.float32), *likenesses])


def write(workdir: epath.Path, sources: list[str], removed: list) -> None:
    rows = sorted(
        (sources[one.index], sources[one.kept], round(one.similarity, 4))
        for one in removed
    )
    keys = "source", "kept", "similarity"
    text = "".join(f"{json.dumps(dict(zip(keys, row)))}\n" for row in rows)
    write_whole(workdir / "duplicates.jsonl", text.encode())


def shots(parts: Sequence[Part], pictures: Pictures, pairs: ndarray) -> dict:
    """Read the pictures of these pairs again, for the page; by index."""
    by_part = {}
    for index in np.unique(pairs).tolist():
        index_of = by_part.setdefault(pictures.parts[index], {})
        index_of[pictures.sources[index]] = index
    by_index = {}
    for number, by_source in by_part.items():
        for item in input_parts.items(parts[number]):
            if isinstance(item, Rejected) or item.source not in by_source:
                continue
            picture = images.read(item.read(), item.source)
            by_index[by_source[item.source]] = dedup_page.shot(item.source, picture)
    return by_index


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The lines that dedup prints at its end."""
    settings, n, seconds = report["settings"], report["pictures"], report["seconds"]
    yield f"{n:,} pictures, {report['removed']:,} of them near-duplicates of others"
    threshold = settings["threshold"]
    measure = settings["embed"]
    yield f"  {report['pairs']:,} pairs by {measure} at {threshold:g} or above"
    for reason, count in report["unreadable"].items():
        yield f"  unreadable {count:,}: {reason}"
    yield "  " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
