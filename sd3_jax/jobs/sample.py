"""Prompts to PNGs, each with a line of JSON, by a checkpoint or by released weights.

A killed job resumes where it stopped.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import pictures, tree
from sd3_jax.assembly import model_parts
from sd3_jax.data import tokenizers
from sd3_jax.data.images import BadImage, read_own
from sd3_jax.distributed import lock, processes, sharding, watchdog
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import parse_json
from sd3_jax.monitoring import compile_time, metrics
from sd3_jax.monitoring.progress import duration
from sd3_jax.reports import html_page
from sd3_jax.sampling import compiled, output_filter, prompt_file
from sd3_jax.sampling.prompt_file import Task
from sd3_jax.sampling.released_sampler import (
    load_for_sampling,
    load_guide,
    sample_tasks,
)
from sd3_jax.sampling.sampler import TrainedSampler, batch_size

log = logging.getLogger(__name__)
LINES = "samples.jsonl"
SHOWN = 64  # pictures on samples.png; samples.html has all
# Settings that only released weights heed.
UNUSED = "max_length clip_skip skip_layers skip_scale skip_start skip_stop".split()


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes workdir/samples/<number>-<prompt>.png, samples.jsonl, .html and .png."""
    workdir = epath.Path(workdir)
    tasks = prompt_file.tasks(config)
    # The filter and the watermark are checked before weights are loaded.
    sides = [(x.settings["height"], x.settings["width"]) for x in tasks]
    guard = output_filter.load(config.sample.filter, config.sample.watermark, sides)
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        if config.weights:
            sample_batch, facts = released(config, mesh, tasks)
        else:
            if config.text.name == "bytes":
                warn_of_cut_prompts(tasks, config.text.length)
                # Its import takes seconds, which are no pace of the first batch.
                tokenizers.byte_ids("x", config.text.length)
            sample_batch, facts = trained(config, workdir, mesh)
        lines = [describe(task, facts | guard.facts()) for task in tasks]
        # A line holds settings and fingerprints of weights: a picture is skipped only
        # if all of these are equal.
        done = recorded(workdir, lines)
        if any(done):
            log.info(
                "%d of %d pictures exist already; skipping them", sum(done), len(tasks)
            )
        known = [x for x, there in zip(lines, done) if there]
        count = len(known)
        with lock.held(workdir, "sample"), appending(workdir / LINES, known) as add:
            for batch, size in batches(tasks, config.sample.batch_size, mesh):
                # A batch is sampled whole even if one picture of it is missing: a
                # smaller batch is another program, whose pictures may differ in the
                # last bits.
                left = [i for i, task in enumerate(batch) if not done[task.index]]
                if not left:
                    continue
                began, compiled_before = time.monotonic(), compile_time.seconds()
                watchdog.expect("a batch of pictures", watchdog.LONG)
                images = sample_batch(filled(batch, size))[left]
                fresh = [lines[batch[i].index] for i in left]
                flags = guard.flags(images, [batch[i].caption for i in left])
                for line, flag in zip(fresh, flags):
                    line |= {"filtered": flag} if flag else {}
                # Toy models without an autoencoder make pictures of a few dozen pixels.
                pixels = config.image.autoencoder == "pixels" and not config.weights
                save(workdir, fresh, images, guard, enlarged=pixels)
                processes.meet(f"sample/{fresh[0]['file']}")  # all are on disk
                add(fresh)
                count += len(left)
                compiling = compile_time.seconds() - compiled_before
                pace = (time.monotonic() - began - compiling) / len(batch)
                log_progress(count, len(tasks), pace, compiling)
    if flagged := sum("filtered" in line for line in lines):
        message = (
            "%d of %d pictures are black, because config.sample.filter flagged them"
        )
        log.warning(message, flagged, len(lines))
    watchdog.expect("the contact sheets", watchdog.LONG)
    if jax.process_index() == 0:
        finish(workdir, lines)


def log_progress(count: int, total: int, pace: float, compiling: float) -> None:
    """A line for each batch; `pace` is seconds a picture without compilation."""
    ends = f", {duration(pace * (total - count))} left" if count < total else ""
    ends += f"; compiled in {compiling:.1f} s" if compiling >= 1 else ""
    log.info("%d of %d pictures, %.2f s each%s", count, total, pace, ends)


def trained(
    config: ConfigDict, workdir: epath.Path, mesh: Mesh
) -> tuple[Callable, dict]:
    """A sampler of tasks by the newest checkpoint, and the facts for each line."""
    parts = model_parts.build_parts(config)
    params, step = model_parts.trained_params(config, parts, workdir, mesh)
    facts = {"step": step, "weights": tree.fingerprint(params)}
    if config.quantize.denoiser:
        facts["quantize"] = {"denoiser": config.quantize.denoiser}
    parts = parts._replace(encoders=model_parts.trained_encoders(workdir, step))
    guide = model_parts.trained_guide(config, parts, workdir, mesh)
    if guide is not None:
        facts["guide"] = int(config.sample.guide)  # a step, as "step" is
    encoder = TrainedSampler(config, parts, mesh, guide=guide).encoder
    if encoder is not None:
        facts["encoders"] = encoder.bundle.fingerprints()
    samplers = {}

    def sample_batch(rows: Sequence[Task]) -> np.ndarray:
        group = rows[0].group
        if group not in samplers:
            config = rows[0].config
            samplers[group] = TrainedSampler(
                config, model_parts.build_parts(config), mesh, encoder, guide
            )
        captions = [task.caption for task in rows]
        return samplers[group](params, captions, [task.number for task in rows])

    return sample_batch, facts


def warn_of_cut_prompts(tasks: Sequence[Task], length: int) -> None:
    """Logs how many prompts the model of bytes truncates."""
    sizes = [len(task.caption.encode()) for task in tasks]
    cut = sum(size >= length for size in sizes)  # the end is a byte as well
    if cut:
        message = "prompts are cut to %d bytes: %d of %d, of which the longest has %d"
        log.warning(message, length - 1, cut, len(sizes), max(sizes))


def released(
    config: ConfigDict, mesh: Mesh, tasks: Sequence[Task]
) -> tuple[Callable, dict]:
    settings = {task.group: task.settings for task in tasks}
    bundle = load_for_sampling(config, mesh, list(settings.values()))
    facts = {"weights": bundle.fingerprint()}
    if scheduler := bundle.scheduler.non_default_settings():
        facts["scheduler"] = scheduler
    if bundle.quantize:
        facts["quantize"] = bundle.quantize
    if config.sample.lora:
        facts["lora"] = list(config.sample.lora)
    guide = load_guide(config, mesh)
    if guide is not None:
        facts["guide"] = guide.fingerprint()
    return functools.partial(sample_tasks, bundle, guide=guide), facts


def filled(batch: Sequence[Task], size: int) -> list[Task]:
    """The batch, repeated from its start up to the size of the program."""
    return [batch[i % len(batch)] for i in range(size)]


def describe(task: Task, facts: dict) -> dict:
    """The picture's line. For released weights `seed` is the one for generate()."""
    own_checkpoint = "step" in facts
    unused = UNUSED if own_checkpoint else ()
    settings = {k: v for k, v in task.settings.items() if k not in unused}
    return {
        "file": f"samples/{task.index:04d}-{slug(task.caption)}.png",
        "prompt": task.prompt if isinstance(task.prompt, str) else list(task.prompt),
        "number": task.number,
        "seed": settings.pop("seed") + (0 if own_checkpoint else task.number),
        **facts,
        "settings": settings,
    }


def recorded(workdir: epath.Path, lines: list[dict]) -> list[bool]:
    """Which pictures exist with the same line as now, as process 0 sees them.

    Their lines get the filter's verdict of that time.
    """
    done = np.zeros(len(lines), bool)
    if jax.process_index() == 0:
        text = b""
        if (workdir / LINES).is_file():
            text = (workdir / LINES).read_bytes()
        # A job killed as it wrote leaves half a line, or half a letter.
        known_lines = map(parsed, text.decode(errors="replace").split("\n"))
        known = {str(line.get("file")): line for line in known_lines}
        for i, line in enumerate(lines):
            path = workdir / line["file"]
            there = known.get(line["file"], {})
            if unfiltered(there) != line and path.is_file():
                there = embedded(path)  # painted, then killed before it had its line
            done[i] = unfiltered(there) == line and path.is_file()
            if done[i]:
                line |= there
    # Disks of other hosts may show other files; all must skip the same pictures.
    return multihost_utils.broadcast_one_to_all(done).tolist()


def parsed(text: str) -> dict:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def unfiltered(line: dict) -> dict:
    """The line as it was before the filter saw the picture."""
    return {name: value for name, value in line.items() if name != "filtered"}


def embedded(path: epath.Path) -> dict:
    """The line in a PNG's metadata, or {}."""
    try:
        return parsed(read_own(path)[1]["sd3_jax"])
    except (KeyError, BadImage):
        return {}


def batches(tasks: list[Task], most: int, mesh) -> Iterator[tuple[list[Task], int]]:
    """Tasks of one shape and one set of settings together, and the program's size.

    A resumed job has the batches of an uninterrupted one, so its pictures are equal.
    """
    # Grouped over all tasks, those that are done included, so that a resumed job has
    # the batches of the first one.
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.group, []).append(task)
    for group in groups.values():
        size = batch_size(len(group), most, mesh)
        for start in range(0, len(group), size):
            yield group[start : start + size], size


def save(
    workdir: epath.Path,
    lines: list[dict],
    images: np.ndarray,
    guard: output_filter.Safety,
    *,
    enlarged: bool,
) -> None:
    """Writes this process's share of the pictures, `enlarged` if they are tiny."""
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    mine = slice(jax.process_index(), None, jax.process_count())
    for line, image in list(zip(lines, images))[mine]:
        text = line["prompt"]
        info = {
            "prompt": text if isinstance(text, str) else text[0],
            "sd3_jax": json.dumps(line),
        }
        image = guard.finished(image, line.get("filtered", ""))
        shown = pictures.enlarged(image) if enlarged else image
        pictures.save_png(shown, workdir / line["file"], info=info)


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


def text_of(lines: list[dict]) -> str:
    return "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)


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


def slug(caption: str) -> str:
    """A file name made of the prompt, without any character that is special."""
    words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:48]
    return words or hashlib.sha256(caption.encode()).hexdigest()[:8]
