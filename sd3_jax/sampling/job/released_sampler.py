"""Released weights, as config.weights names them, and the pictures of their tasks."""

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float32, UInt8
from ml_collections import ConfigDict

from sd3_jax import api, pictures
from sd3_jax.distributed import processes
from sd3_jax.errors import UserError, prefixed
from sd3_jax.models.step_cache import Record
from sd3_jax.sampling import (
    argument_checks,
    bundle,
    bundle_loading,
    cache_arguments,
    control_arguments,
    control_loading,
    guidance_arguments,
)
from sd3_jax.sampling.control import ControlBundle, require_equal_depths
from sd3_jax.sampling.job import line_arrays, prompt_file, task_arguments
from sd3_jax.sampling.job.texts_ahead import TextsAhead
from sd3_jax.sampling.schedulers.scheduler import Scheduler
from sd3_jax.weights import components, sources

log = logging.getLogger(__name__)
Report = Callable[[Record], None]
TEXT_ALONE = line_arrays.Row(None, None, (), ())  # a task without pictures


def load(config: ConfigDict, mesh: Mesh, **options) -> bundle.Bundle:
    """The bundle of config.weights with config.sample's lora and embeddings, in
    config.model.dtype and quantized by config.quantize, over the mesh."""
    from_config = dict(
        dtype=config.model.dtype,
        quantize=config.quantize.to_dict(),
        tokenizers_from=config.tokenizers,
        lora=config.sample.lora,
        embeddings=config.sample.embeddings,
        placement=config.sample.placement,
        context_attention=config.model.context_attention,
    )
    return bundle_loading.load(config.weights, mesh=mesh, **from_config | options)


def load_for_sampling(
    config: ConfigDict,
    mesh: Mesh,
    settings: Sequence[dict[str, Any]],
    *,
    unfit: MutableMapping[int, str] | None = None,
    **options: Any,
) -> bundle.Bundle:
    """load, with a UserError before any weight is read if the model cannot do what one
    of these settings of tasks asks for.

    With `unfit` it gets the reason for each such setting, by its place, and the error
    is raised only if the model can do none.
    """
    # The weights do not say that they are distilled; their name usually does.
    if "turbo" in config.weights.lower() and config.sample.cfg > 1:
        message = (
            "config.weights = %s and config.sample.cfg = %g: turbo models need 4 steps"
            " without guidance; use --config=released:sd35_large_turbo"
        )
        log.warning(message, config.weights, config.sample.cfg)
    guide = config.sample.guide
    with prefixed(f"config.sample.guide = {guide}"):
        for name in sources.split(guide) if guide else ():
            sources.locate(name)  # before the model's weights are read
    # Passed to the loader, which knows the configurations before it reads weights.
    check_all = partial(check, settings=settings, unfit=unfit)
    model = load(config, mesh, check=check_all, **options)
    warn_of_another_model(config, model)
    return model


def warn_of_another_model(config: ConfigDict, model: bundle.Bundle) -> None:
    """Warns if the recipe, whose steps and cfg are used, is for another model."""
    denoiser = model.configs.get("denoiser")
    if denoiser is None:
        return
    # These three tell the published models apart; sizes follow from the depth.
    recipe = config.model.depth, config.model.qk_norm, config.model.dual_blocks
    dual = len(denoiser.get("dual_attention_layers") or ())
    weights = denoiser["num_layers"], denoiser.get("qk_norm") is not None, dual
    if recipe != weights:
        message = (
            "the recipe is of another model than %s, which is %s: steps and cfg may"
        )
        message += " not suit it; choose configs/released.py:VARIANT by the weights"
        name = components.released_name(denoiser)
        log.warning(message, config.weights, name)


def check(
    scheduler: Scheduler,
    configs: dict[str, dict],
    settings: Sequence[dict[str, Any]],
    unfit: MutableMapping[int, str] | None = None,
) -> None:
    """UserError for the first of the settings that the model cannot do.

    With `unfit`, the reasons are collected there; an error is one that all have.
    """
    reasons = {}
    for i, asked in enumerate(settings):
        try:
            _check(scheduler, configs, asked)
        except UserError as error:
            reasons[i] = str(error)
    if reasons and (unfit is None or len(reasons) == len(settings)):
        i, reason = next(iter(reasons.items()))
        which = f"prompt {i + 1} of {len(settings)}: " if len(settings) > 1 else ""
        raise UserError(f"{which}{reason}")
    if unfit is not None:
        unfit.update(reasons)


def _check(scheduler: Scheduler, configs: dict[str, dict], asked: dict) -> None:
    denoiser = configs.get("denoiser", {})
    # Each level but the first halves the sides: four levels are a factor of 8.
    levels = len(configs.get("vae", {}).get("block_out_channels", range(4)))
    unit = 2 ** (levels - 1) * denoiser.get("patch_size", 2)
    most = unit * denoiser.get("pos_embed_max_size", 2**16)
    for name in ("height", "width"):
        if asked[name] > most:
            raise UserError(
                f"config.image.{name} = {asked[name]}: expected at most {most} of this"
                " model"
            )
    depth = denoiser.get("num_layers", 1)
    steering = guidance_arguments.checked(
        depth,
        **task_arguments.guidance_options(asked),
        skip=guidance_arguments.Layers(asked["skip_layers"], asked["skip_scale"]),
        # config.sample.guide, without which a config is not valid.
        guide=True if asked["guidance_method"] == "autoguidance" else None,
    )
    argument_checks.whole(
        "clip_skip", asked["clip_skip"], 0, bundle.most_clip_skip(configs)
    )
    tokens = asked["height"] * asked["width"] // unit**2
    options = task_arguments.solver_options(asked)
    solver, _ = scheduler.sampler(asked["steps"], tokens, **options)
    steering.require_solver(solver)
    if "control" in asked:
        control_arguments.require_solver(solver)
    if asked.get("cache"):
        options = task_arguments.cache_options(asked)
        caching = cache_arguments.checked(depth, *options.values())
        if caching is not None:
            caching.require_fit(steering, solver, control="control" in asked)


def load_guide(config: ConfigDict, mesh: Mesh) -> bundle.Bundle | None:
    """The denoiser of config.sample.guide, the weaker model of autoguidance."""
    if not config.sample.guide:
        return None
    with prefixed(f"config.sample.guide = {config.sample.guide}"):
        return bundle_loading.load(
            config.sample.guide,
            mesh=mesh,
            dtype=config.model.dtype,
            quantize={"denoiser": config.quantize.denoiser},
            only=["denoiser"],
        )


def load_nets(
    model: bundle.Bundle, tasks: Sequence[prompt_file.Task]
) -> tuple[dict[str, ControlBundle], dict[int, str]]:
    """The ControlNets of tasks by path; and why tasks, by index, cannot be painted."""
    # A net that cannot be loaded takes its own lines along, and no others.
    nets, failures, unfit = {}, {}, {}
    for task in tasks:
        paths = [control["net"] for control in task.settings.get("control", ())]
        for path in paths:
            # Many lines name one net: it is loaded, or refused, once.
            if path in nets or path in failures:
                continue
            try:
                nets[path] = control_loading.load_control(path, model)
            except UserError as error:
                failures[path] = str(error)
        reasons = [failures[path] for path in paths if path in failures]
        if reasons:
            unfit[task.index] = reasons[0]
            continue
        try:
            require_equal_depths([nets[path].module for path in paths])
        except UserError as error:
            unfit[task.index] = str(error)
    return nets, unfit


def sample_lines(
    model: bundle.Bundle,
    nets: Mapping[str, ControlBundle],
    guide: bundle.Bundle | None,
    tasks: Sequence[prompt_file.Task],
    *,
    texts: TextsAhead | None = None,
    report: Report = cache_arguments.log_report,
    adapters: Mapping[str, float] | None = None,
) -> tuple[UInt8[np.ndarray, "n h w 3"] | None, dict[int, str]]:
    """Pictures of tasks of one group, None if none can be painted; and why not, by row.

    A row that fails is painted as another one, so that the program is the same. Tasks
    that are in `texts` have their embeddings there. A step cache's record goes to
    `report`. `adapters` are weights of the model's, by default its own or the tasks'.
    """
    settings = tasks[0].settings
    guides = settings["guidance_method"] == "autoguidance"
    extra: dict[str, Any] = {"guide": guide} if guides else {}
    extra |= {} if adapters is None else {"adapters": adapters}
    if settings.get("cache"):
        extra["cache_report"] = report
    rows = [TEXT_ALONE] * len(tasks)
    failures: dict[int, str] = {}
    if settings.keys() & {"image", "control", "lora"}:
        rows, failures = _read_rows(tasks)
    try:
        extra |= line_arrays.adapters(model, settings.get("lora"))
    except UserError as error:
        failures = dict.fromkeys(range(len(tasks)), str(error))
    readable = [i for i in range(len(tasks)) if i not in failures]
    if not readable:
        return None, failures

    def paint(places: Sequence[int]) -> np.ndarray:
        pixels = line_arrays.arguments(settings, [rows[i] for i in places], nets)
        painted = [tasks[i] for i in places]
        embeddings = {} if texts is None else texts.arguments(painted)
        return _generate(model, painted, extra | pixels | embeddings)

    try:
        places = [readable[0] if i in failures else i for i in range(len(tasks))]
        images, unpaintable = paint(places), {}
    except UserError:
        images, unpaintable = _paint_apart(paint, tasks, readable)
    failures |= unpaintable
    if images is None:
        return None, failures
    lost = [i for i in readable if np.isnan(images[i]).any()]
    failures |= {i: _why_nan(model) for i in lost}
    # Rows that fail are not written, but NaN has no byte.
    images = np.nan_to_num(images)
    return (_to_bytes(images) if len(failures) < len(tasks) else None), failures


def _paint_apart(
    paint: Callable[[Sequence[int]], np.ndarray],
    tasks: Sequence[prompt_file.Task],
    readable: Sequence[int],
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Pictures of a batch that fails as a whole, each task by the batch's program; and
    why rows cannot be painted."""
    images: dict[int, np.ndarray] = {}
    failures: dict[int, str] = {}
    for index in dict.fromkeys(tasks[i].index for i in readable):
        places = [i for i in readable if tasks[i].index == index]
        try:
            painted = paint([places[0]] * len(tasks))
        except UserError as error:
            failures |= dict.fromkeys(places, str(error))
            continue
        images |= {i: painted[i] for i in places}
    if not images:
        return None, failures
    blank = np.zeros_like(next(iter(images.values())))
    return np.stack([images.get(i, blank) for i in range(len(tasks))]), failures


def _why_nan(model: bundle.Bundle) -> str:
    fault = "the pixels are NaN, because numbers overflow"
    if model.dtype != "float32":
        return f"{fault} in {model.dtype}; set config.model.dtype to float32"
    return f"{fault}; lower the weights of its LoRAs or its guidance"


def _read_rows(
    tasks: Sequence[prompt_file.Task],
) -> tuple[list[line_arrays.Row], dict[int, str]]:
    """The pixels of tasks, and why those of some rows cannot be read."""
    # A batch that is filled up repeats its tasks: each is read once.
    outcomes: dict[int, tuple[line_arrays.Row | None, str]] = {}
    for task in tasks:
        if task.index not in outcomes:
            try:
                outcomes[task.index] = (
                    line_arrays.read_checked_row(task.settings, task.size),
                    "",
                )
            except UserError as error:
                outcomes[task.index] = None, str(error)
    mine = [outcomes[task.index][1] for task in tasks]
    # Processes must paint the same rows, and their disks may differ.
    reasons = processes.shared(lambda rows: [mine[i] for i in rows], len(mine))
    if lost := [x for x, agreed in zip(mine, reasons) if bool(x) != bool(agreed)]:
        raise UserError(
            f"{lost[0] or 'a picture'}: other processes can read it, or cannot; every"
            " host needs the same files"
        )
    failures = {i: reason for i, reason in enumerate(reasons) if reason}
    return [outcomes[task.index][0] or TEXT_ALONE for task in tasks], failures


def sample_tasks(
    model: bundle.Bundle,
    tasks: Sequence[prompt_file.Task],
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of tasks that share a shape and settings; `extra` is generate's."""
    return _to_bytes(_generate(model, tasks, extra))


def _generate(
    model: bundle.Bundle, tasks: Sequence[prompt_file.Task], extra: Mapping[str, Any]
) -> Float32[np.ndarray, "n h w 3"]:
    call = task_arguments.generate_arguments(tasks) | extra
    images = api.generate(model, **call)
    # Every process gets all rows: which of them it writes or scores is decided later.
    images = multihost_utils.process_allgather(images, tiled=True)
    return np.array(images, np.float32)


def _to_bytes(images: Float32[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
    # (n, h, w, 3) from [0, 1]
    return pictures.to_uint8(2 * images - 1)


def cut_words(
    model: bundle.Bundle, tasks: Sequence[prompt_file.Task]
) -> list[dict[str, str]]:
    """For each task the words of its prompt that encoders do not read, by encoder.

    They are logged here, so that batches need not log them one by one.
    """
    # A model without encoders cuts nothing: its error comes with the first batch.
    if not any(model.text_models):
        return [{} for _ in tasks]
    keys = [
        (task.settings["max_length"], task.settings["prompt_weighting"] or None)
        for task in tasks
    ]
    prompts = [task_arguments.prompt_of(task) for task in tasks]
    cuts: dict[tuple, dict[str, str]] = {}
    for key in dict.fromkeys(keys):
        # Each text once: the seeds of a prompt share its words.
        texts = list(dict.fromkeys(p for p, k in zip(prompts, keys) if k == key))
        words = _cut_words(model, texts, *key)
        cuts |= {(key, text): cut for text, cut in zip(texts, words)}
    return [cuts[key, prompt] for key, prompt in zip(keys, prompts)]


def _cut_words(
    model: bundle.Bundle, texts: Sequence[Any], length: int, weighting: str | None
) -> list[dict[str, str]]:
    """tokens_cut; {} for a text that cannot be read, whose batch says why."""
    try:
        return model.tokens_cut(texts, length, weighting=weighting, log=True)
    except UserError:
        if len(texts) == 1:
            return [{}]
    return [_cut_words(model, [text], length, weighting)[0] for text in texts]
