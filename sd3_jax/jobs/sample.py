"""Prompts to PNGs, each with a line of JSON, by a checkpoint or by released weights.

A killed job resumes where it stopped.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures
from sd3_jax.data.images import read_own
from sd3_jax.distributed import lock, processes, sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import shown
from sd3_jax.monitoring import compile_time, metrics
from sd3_jax.monitoring.progress import duration
from sd3_jax.reports import html_page
from sd3_jax.sampling import compiled
from sd3_jax.sampling.job import (
    output_filter,
    painters,
    picture_lines,
    prompt_file,
    task_lines,
    texts_ahead,
)
from sd3_jax.sampling.job.picture_lines import LINES, text_of
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.job.task_batches import batches, filled

log = logging.getLogger(__name__)
SHOWN = 64  # pictures on samples.png; samples.html has all


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes workdir/samples/<number>-<prompt>.png, samples.jsonl, .html and .png."""
    workdir = epath.Path(workdir)
    tasks = prompt_file.tasks(config)
    if repeated := config.sample["from"]:
        before = picture_lines.read(repeated, "config.sample.from")
        config = tasks[0].config  # with the picture's LoRAs and its watermark
    # The filter and the watermark are checked before weights are loaded.
    sides = [task.size for task in tasks]
    guard = output_filter.load(config.sample.filter, config.sample.watermark, sides)
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        load = painters.released if config.weights else painters.trained
        painter = load(config, workdir, mesh, tasks)
        facts, suffix = painter.facts | guard.facts(), config.sample.format
        facts |= picture_lines.encoding(suffix, config.sample.quality)
        lines = [
            task_lines.describe(task, facts, painter.nets, suffix) for task in tasks
        ]
        for line, cut in zip(lines, painter.cuts):
            line |= {"cut": cut} if cut else {}
        if repeated:
            picture_lines.warn_of_changes(before, lines[0], repeated)
        failures = paint_missing(config, workdir, mesh, tasks, lines, painter, guard)
    lines = require_any(lines, tasks, failures)
    if flagged := sum("filtered" in line for line in lines):
        message = (
            "%d of %d pictures are black, because config.sample.filter flagged them"
        )
        log.warning(message, flagged, len(lines))
    watchdog.expect("the contact sheets", watchdog.LONG)
    if jax.process_index() == 0:
        finish(workdir, lines)


def paint_missing(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    tasks: Sequence[Task],
    lines: list[dict],
    painter: painters.Painter,
    guard: output_filter.Safety,
) -> dict[int, str]:
    """Paints the pictures that are missing, and completes their `lines`.

    Returns why pictures cannot be painted, by the index of their task.
    """
    # A line holds settings and fingerprints of weights: a picture is skipped only if
    # all of these are equal.
    done = picture_lines.recorded(workdir, lines)
    if any(done):
        message = "%d of %d pictures exist already; skipping them"
        log.info(message, sum(done), len(tasks))
    # A task that fails gets no line in the file, so that a later run tries it again.
    failures = dict(painter.unfit)
    warn_of_failures(tasks, failures)
    skipped = lambda task: done[task.index] or task.index in failures
    known = [x for x, there in zip(lines, done) if there]
    count, most = len(known), config.sample.batch_size
    with lock.held(workdir, "sample"), appending(workdir / LINES, known) as add:
        program, spread = painter.program, painter.spread
        # A batch is sampled whole even if one picture of it is missing: a smaller batch
        # is another program, whose pictures may differ in the last bits.
        missing = [
            (batch, size)
            for batch, size in batches(tasks, most, mesh, program, spread=spread)
            if not all(map(skipped, batch))
        ]
        for batch, size in encoded_ahead(missing, painter):
            began, compiled_before = time.monotonic(), compile_time.seconds()
            watchdog.expect("a batch of pictures", watchdog.LONG)
            images, reasons = painter.paint(filled(batch, size))
            bad = {batch[i].index: x for i, x in reasons.items() if i < len(batch)}
            warn_of_failures(tasks, bad)
            failures.update(bad)
            left = [i for i, task in enumerate(batch) if not skipped(task)]
            if not left or images is None:
                continue
            # A picture that is repeated has the row that it had.
            rows = {(batch[i].slot or (i, size))[0]: batch[i] for i in left}
            fresh = [lines[task.index] for task in rows.values()]
            for line, row in zip(fresh, rows):
                line |= {"batch": [row, size]}
            captions = [task.caption for task in rows.values()]
            finish_batch(config, workdir, fresh, captions, images[[*rows]], guard)
            # After the files: a line that is written promises that its picture is.
            add(fresh)
            count += len(left)
            compiling = compile_time.seconds() - compiled_before
            pace = (time.monotonic() - began - compiling) / len(batch)
            log_progress(count, len(tasks), pace, compiling)
    return failures


def encoded_ahead(
    missing: Sequence[tuple[list[Task], int]], painter: painters.Painter
) -> Iterator[tuple[list[Task], int]]:
    """Yields the batches, after the texts of as many as are encoded together."""
    if painter.encode is None:
        yield from missing
        return
    start = 0
    while start < len(missing):
        # Together, since the encoders and the denoiser take turns on the devices.
        count = max(1, texts_ahead.PICTURES // missing[start][1])
        together = missing[start : start + count]
        watchdog.expect("the texts of the next batches", watchdog.LONG)
        painter.encode([filled(batch, size) for batch, size in together])
        yield from together
        start += count


def finish_batch(
    config: ConfigDict,
    workdir: epath.Path,
    lines: list[dict],
    captions: list[str],
    images: np.ndarray,
    guard: output_filter.Safety,
) -> None:
    """Filters pictures, notes the verdicts in their lines and writes the files."""
    for line, flag in zip(lines, guard.flags(images, captions)):
        line |= {"filtered": flag} if flag else {}
    # Toy models without an autoencoder make pictures of a few dozen pixels.
    enlarged = config.image.autoencoder == "pixels" and not config.weights
    quality = config.sample.quality
    save(workdir, lines, images, guard, quality=quality, enlarged=enlarged)
    processes.meet(f"sample/{lines[0]['file']}")  # all are on disk


def warn_of_failures(tasks: Sequence[Task], failures: Mapping[int, str]) -> None:
    for index, reason in failures.items():
        where = tasks[index].where or f"prompt {index + 1}"
        log.warning("%s: skipped: %s", where, shown(reason, 300))


def require_any(
    lines: list[dict], tasks: Sequence[Task], failures: Mapping[int, str]
) -> list[dict]:
    """The lines of pictures that are painted; UserError if none is."""
    if not failures:
        return lines
    if len(failures) == len(tasks):
        raise UserError(
            f"no picture can be painted; the first: {failures[min(failures)]}"
        )
    log.warning("skipped %d of %d pictures, see above", len(failures), len(tasks))
    return [line for i, line in enumerate(lines) if i not in failures]


def log_progress(count: int, total: int, pace: float, compiling: float) -> None:
    """A line for each batch; `pace` is seconds a picture without compilation."""
    ends = f", {duration(pace * (total - count))} left" if count < total else ""
    ends += f"; compiled in {compiling:.1f} s" if compiling >= 1 else ""
    log.info("%d of %d pictures, %.2f s each%s", count, total, pace, ends)


def save(
    workdir: epath.Path,
    lines: list[dict],
    images: np.ndarray,
    guard: output_filter.Safety,
    *,
    quality: int = 95,
    enlarged: bool,
) -> None:
    """Writes this process's share of the pictures, `enlarged` if they are tiny."""
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    # All processes have all pictures; each writes its share.
    mine = slice(jax.process_index(), None, jax.process_count())
    for line, image in list(zip(lines, images))[mine]:
        image = guard.finished(image, line.get("filtered", ""))
        tile = pictures.enlarged(image) if enlarged else image
        picture_lines.save(workdir / line["file"], tile, line, quality)


@contextlib.contextmanager
def appending(
    path: epath.Path, lines: list[dict]
) -> Iterator[Callable[[list[dict]], None]]:
    """A function that adds lines to samples.jsonl, which begins with `lines`.

    Only process 0 writes.
    """
    if jax.process_index() != 0:
        yield lambda more: None
        return
    write_whole(path, text_of(lines).encode())
    with contextlib.closing(metrics.open_log(path)) as log_file:
        yield lambda more: log_file.write(text_of(more))


def finish(workdir: epath.Path, lines: list[dict]) -> None:
    """Writes the lines in order, and two contact sheets."""
    write_whole(workdir / LINES, text_of(lines).encode())
    page = html_page.render("samples.html", lines=lines)
    write_whole(workdir / "samples.html", page.encode())
    there = lambda line: (workdir / line["file"]).is_file()  # hosts may not share disks
    first = [line for line in lines if there(line)][:SHOWN]
    images = [read_own(workdir / line["file"])[0] for line in first]
    shape = images[0].shape
    # A grid needs pictures of one size; samples.html shows them all.
    alike = [i for i, image in enumerate(images) if image.shape == shape]
    captions = [str(first[i]["prompt"]) for i in alike]
    together = pictures.grid(
        np.stack([images[i] for i in alike]),
        columns=min(len(alike), 8),
        captions=captions,
    )
    pictures.save_png(together, workdir / "samples.png")
    for line in lines[:8]:
        print(workdir / line["file"])
    if len(lines) > 8:
        print(f"… {len(lines)} pictures; see {workdir / 'samples.html'}")
    sys.stdout.flush()
