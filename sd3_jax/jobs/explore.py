"""Look inside the making of pictures: a page for each prompt.

    sd3-jax explore --config=released --workdir=DIR --config.weights=PATH
        --config.sample.prompt="a red fox"

Each page shows the latents over the steps, the norms of each block, and which part of
the picture attends to each word.
"""

import logging

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sd3_jax import api, pictures
from sd3_jax.distributed import sharding, watchdog
from sd3_jax.errors import UserError
from sd3_jax.files import write_whole
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import arguments as sampling_arguments
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.job import prompt_file, released_sampler, task_arguments
from sd3_jax.sampling.job.picture_lines import slug
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.tools.explore import exploration, explore_page

log = logging.getLogger(__name__)
UNREAD = {"image", "mask", "outpaint", "control", "lora"}  # settings of a line
MOST = 64  # pictures, each with a page


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Write WORKDIR/explore/<number>-<prompt>.html for each task of `sample`."""
    workdir = epath.Path(workdir)
    if not config.weights:
        raise UserError(
            "config.weights is empty; explore reads released weights, so set"
            " --config.weights=PATH (`convert` writes those of a run)"
        )
    if jax.process_count() > 1:
        raise UserError("explore runs in one process; unset SD3_NUM_PROCESSES")
    tasks = prompt_file.tasks(config)
    if len(tasks) > MOST:
        raise UserError(
            f"{len(tasks)} pictures; explore makes at most {MOST} pages, so set fewer"
            " prompts or config.sample.per_prompt"
        )
    for task in tasks:
        # The page would show another picture than `sample` paints from the line.
        for name in UNREAD & task.settings.keys():
            raise UserError(
                f'"{shown(task.caption, 60)}" sets {name}, which explore does not read;'
                " remove it"
            )
    mesh = sharding.make_mesh(**config.mesh)
    settings = [task.settings for task in tasks]
    bundle = released_sampler.load_for_sampling(config, mesh, settings)
    for task in tasks:
        # Words are checked before the first picture is sampled.
        tokens_of(bundle, task, config.explore.words)
    for task in tasks:
        watchdog.expect("a picture to explore", watchdog.LONG)
        page = page_of(bundle, task, config.explore.words, config.explore.moments)
        path = workdir / "explore" / f"{task.index:04d}-{slug(task.caption)}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, page.encode())
        print(path, flush=True)


def tokens_of(bundle: Bundle, task: Task, words: tuple[str, ...]) -> dict:
    arguments = task_arguments.generate_arguments([task])
    return exploration.tokens_of(
        bundle,
        arguments["prompts"][0],
        words,
        arguments["max_sequence_length"],
        weighting=arguments["prompt_weighting"],
    )


def page_of(bundle: Bundle, task: Task, words: tuple[str, ...], count: int) -> str:
    """The page of one task's picture, with `count` moments of its sampling."""
    arguments = task_arguments.generate_arguments([task])
    # --- sample, with the latents before each step and after the last
    steps = api.generate(
        bundle, **arguments, output="latents", return_latents="all"
    )  # (n + 1, 1, h, w, c)
    latents = np.asarray(steps)
    settings = ("steps", "solver", "grid", "shift")
    schedule = {name: arguments[name] for name in settings}
    shape = latents.shape[2:]
    # The times that generate used, by the same function: latents have no record of
    # theirs.
    solver, times = sampling_arguments.settings(
        bundle, shape, **schedule, mu=None, sigmas=None
    )
    # --- observe the denoiser again at a few of these
    cond = bundle.encode_prompts(
        arguments["prompts"],
        arguments["max_sequence_length"],
        clip_skip=arguments["clip_skip"],
        weighting=arguments["prompt_weighting"],
    )
    tokens = tokens_of(bundle, task, words)
    moments = [
        exploration.moment(bundle, latents[i], i, float(times[i]), cond, tokens)
        for i in exploration.moments_of(len(times) - 1, count)
    ]
    image = pictures.to_uint8(2 * np.asarray(bundle.decode(latents[-1]))[0] - 1)
    previews = exploration.previews(latents[:, 0], times)
    return explore_page.html(
        task.caption, image, previews, moments, facts(task, solver)
    )


def facts(task: Task, solver: str) -> list[tuple[str, str]]:
    """The settings of the picture that the page lists."""
    s = task.settings
    return [
        ("size", f"{s['width']} × {s['height']} pixels"),
        ("seed", str(s["seed"] + task.number)),
        ("steps", str(s["steps"])),
        ("solver", solver),
        ("guidance", f"{s['cfg']:g}"),
        *([("negative prompt", s["negative"])] if s["negative"] else ()),
    ]
