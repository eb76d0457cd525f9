"""What paints the pictures of the job `sample`: a run's checkpoint, or a release."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.data import tokenizers
from sd3_jax.errors import UserError
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.cache_arguments import log_report
from sd3_jax.sampling.job import released_sampler, task_arguments
from sd3_jax.sampling.job.prompt_file import Task
from sd3_jax.sampling.job.released_sampler import Report
from sd3_jax.sampling.job.sampler import TrainedSampler
from sd3_jax.sampling.job.texts_ahead import TextsAhead
from sd3_jax.sampling.text.encoder import Encoder

log = logging.getLogger(__name__)


class Painter(NamedTuple):
    """Weights that paint tasks of one group.

    paint(tasks) -> pictures, or None; and why rows are not painted. `facts` are those
    of every line. `nets` are fingerprints of ControlNets by path, `unfit` reasons by
    the index of a task. program(task) is what tells its program from others, in words.
    `cuts` are the words of each task's prompt that an encoder does not read.
    encode(batches), where there is one, encodes the texts of the next batches.
    With `spread` a batch may have fewer rows than the mesh has shards
    (row_batches.batch_size).
    """

    paint: Callable[[Sequence[Task]], tuple[np.ndarray | None, dict[int, str]]]
    facts: dict
    program: Callable[[Task], tuple]
    nets: Mapping[str, str] = MappingProxyType({})
    unfit: Mapping[int, str] = MappingProxyType({})
    cuts: Sequence[Mapping[str, str]] = ()
    encode: Callable[[Sequence[Sequence[Task]]], None] | None = None
    spread: bool = False
    denoiser: Callable[[], str] = str  # the fingerprint of a calibration


class Run(NamedTuple):
    """A run's checkpoint, loaded: what its samplers share."""

    params: dict
    guide: dict | None
    encoder: Encoder | None
    facts: dict

    def parts_of(self, config: ConfigDict) -> model_parts.Parts:
        """The modules at the size of a task's config."""
        return model_parts.build_parts(config)


def trained_run(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> Run:
    """The newest checkpoint of `workdir`; UserError if its prompts need encoders."""
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
    return Run(params, guide, encoder, facts)


def trained(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    tasks: Sequence[Task],
    report: Report = log_report,
) -> Painter:
    """The newest checkpoint as a Painter; `report` gets a step cache's record."""
    if config.text.name == "bytes":
        warn_of_cut_prompts(tasks, config.text.length)
        # Its import takes seconds, which are no pace of the first batch.
        tokenizers.byte_ids("x", config.text.length)
    run = trained_run(config, workdir, mesh)
    samplers = {}

    def paint(rows: Sequence[Task]) -> tuple[np.ndarray | None, dict[int, str]]:
        group = rows[0].group
        # Made when it is needed: a resumed job may skip whole groups.
        if group not in samplers:
            config = rows[0].config
            parts = run.parts_of(config)
            samplers[group] = TrainedSampler(
                config, parts, mesh, run.encoder, run.guide, report
            )
        captions = [task.caption for task in rows]
        numbers = [task.number for task in rows]
        try:
            return samplers[group](run.params, captions, numbers), {}
        except UserError as error:  # ends these pictures, not the job
            return None, dict.fromkeys(range(len(rows)), str(error))

    # Each sampler compiles a program of its own.
    program = lambda task: task.group
    denoiser = lambda: tree.fingerprint(run.params["denoiser"])
    return Painter(paint, run.facts, program, denoiser=denoiser)


def released(
    config: ConfigDict,
    workdir: epath.Path,
    mesh: Mesh,
    tasks: Sequence[Task],
    report: Report = log_report,
) -> Painter:
    """config.weights as a Painter, with the ControlNets that tasks name."""
    groups = {task.group: task.settings for task in tasks}
    unfit_groups: dict[int, str] = {}
    # LoRAs of lines are loaded for their group.
    options = {"lora": ()} if "lora" in tasks[0].settings else {}
    settings = list(groups.values())
    bundle = released_sampler.load_for_sampling(
        config, mesh, settings, unfit=unfit_groups, **options
    )
    # The model may fit some groups of settings and not others.
    place = {group: i for i, group in enumerate(groups)}
    unfit = {x.index: unfit_groups.get(place[x.group], "") for x in tasks}
    unfit = {index: reason for index, reason in unfit.items() if reason}
    fitting = [task for task in tasks if task.index not in unfit]
    nets, without_net = released_sampler.load_nets(bundle, fitting)
    lora = () if options else config.sample.lora
    files = {"lora": list(lora), "embeddings": list(config.sample.embeddings)}
    guide = released_sampler.load_guide(config, mesh)
    facts = released_facts(bundle, guide, files)
    texts = TextsAhead(bundle) if config.sample.placement == "sequential" else None
    options = dict(texts=texts, report=report)
    paint = functools.partial(
        released_sampler.sample_lines, bundle, nets, guide, **options
    )
    prints = {path: tree.fingerprint(net.variables) for path, net in nets.items()}
    program = task_arguments.program
    cuts = released_sampler.cut_words(bundle, tasks)
    return Painter(
        paint,
        facts,
        program,
        prints,
        unfit | without_net,
        cuts,
        encode=None if texts is None else texts.encode,
        spread=True,
        denoiser=lambda: bundle.unadapted_fingerprint("denoiser"),
    )


def released_facts(
    bundle: Bundle, guide: Bundle | None, files: Mapping[str, list[str]]
) -> dict[str, Any]:
    """What decides the pictures of released weights, for their lines.

    `files` are those that were loaded beside the weights, by key of config.sample.
    """
    facts = {
        "weights": bundle.fingerprint(),
        "scheduler": bundle.scheduler.non_default_settings(),
        "quantize": bundle.quantize,
        **files,
        "guide": None if guide is None else guide.fingerprint(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def warn_of_cut_prompts(tasks: Sequence[Task], length: int) -> None:
    """Logs how many prompts the model of bytes truncates."""
    sizes = [len(task.caption.encode()) for task in tasks]
    cut = sum(size >= length for size in sizes)  # the end is a byte as well
    if cut:
        message = "prompts are cut to %d bytes: %d of %d, of which the longest has %d"
        log.warning(message, length - 1, cut, len(sizes), max(sizes))
