"""Released weights, as config.weights names them, and the pictures of their tasks."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import UInt8
from ml_collections import ConfigDict

from sd3_jax import api, pictures
from sd3_jax.errors import UserError, prefixed
from sd3_jax.sampling import (
    argument_checks,
    bundle,
    bundle_loading,
    guidance_arguments,
    prompt_file,
)
from sd3_jax.sampling.scheduler import Scheduler
from sd3_jax.weights import components, sources

log = logging.getLogger(__name__)


def load(config: ConfigDict, mesh: Mesh, **options) -> bundle.Bundle:
    """The bundle of config.weights with config.sample.lora, in config.model.dtype and
    quantized by config.quantize, over the mesh."""
    from_config = dict(
        dtype=config.model.dtype,
        quantize=config.quantize.to_dict(),
        tokenizers_from=config.tokenizers,
        lora=config.sample.lora,
    )
    return bundle_loading.load(config.weights, mesh=mesh, **from_config | options)


def load_for_sampling(
    config: ConfigDict, mesh: Mesh, settings: Sequence[dict[str, Any]]
) -> bundle.Bundle:
    """load, with a UserError before any weight is read if the model cannot do what one
    of these settings of tasks asks for."""
    # The weights do not say that they are distilled; their name usually does.
    if "turbo" in config.weights.lower() and config.sample.cfg > 1:
        message = (
            "config.weights = %s and config.sample.cfg = %g: turbo models need 4 steps"
            " without guidance; use --config=released:sd35_large_turbo"
        )
        log.warning(message, config.weights, config.sample.cfg)
    with prefixed(f"config.sample.guide = {config.sample.guide}"):
        for name in sources.split(config.sample.guide):
            sources.locate(name)  # before the model's weights are read
    model = load(config, mesh, check=partial(check, settings=settings))
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
    scheduler: Scheduler, configs: dict[str, dict], settings: Sequence[dict[str, Any]]
) -> None:
    """UserError for the first of the settings that the model cannot do."""
    for number, asked in enumerate(settings, 1):
        try:
            _check(scheduler, configs, asked)
        except UserError as error:
            which = f"prompt {number} of {len(settings)}: " if len(settings) > 1 else ""
            raise UserError(f"{which}{error}") from None


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
    guidance = guidance_arguments.checked(
        depth,
        **guidance_options(asked),
        skip=guidance_arguments.Layers(asked["skip_layers"], asked["skip_scale"]),
        # config.sample.guide, without which a config is not valid.
        guide=True if asked["guidance_method"] == "autoguidance" else None,
    )
    argument_checks.whole(
        "clip_skip", asked["clip_skip"], 0, bundle.most_clip_skip(configs)
    )
    tokens = asked["height"] * asked["width"] // unit**2
    solver, _ = scheduler.sampler(asked["steps"], tokens, **solver_options(asked))
    guidance.require_solver(solver)


def solver_options(settings: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A task's solver, grid and shift; None stands for the model's default."""
    # Recipes write "" or 0 for "the model's own", which the API spells None.
    return {name: settings[name] or None for name in ("solver", "grid", "shift")}


def guidance_options(settings: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """A task's guidance, as guidance_arguments.checked takes it."""
    return dict(
        scale=settings["cfg"],
        interval=(settings["cfg_start"], settings["cfg_stop"]),
        rescale=settings["rescale"],
        method=settings["guidance_method"],
        options=guidance_arguments.options_of(settings["guidance_options"]),
        schedule=settings["guidance_schedule"],
        negative=bool(settings["negative"]),
    )


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


def sample_tasks(
    model: bundle.Bundle,
    tasks: Sequence[prompt_file.Task],
    guide: bundle.Bundle | None = None,
) -> UInt8[np.ndarray, "n h w 3"]:
    """Pictures of tasks that share a shape and settings."""
    # A task's prompt is one text, or one for each of the three encoders.
    prompts = [
        x.prompt if isinstance(x.prompt, str) else bundle.Prompt(*x.prompt)
        for x in tasks
    ]
    # Tasks of one batch share all settings but negative prompt and seed (Task.group).
    s = tasks[0].settings
    images = api.generate(
        model,
        prompts,
        negative_prompts=[x.settings["negative"] for x in tasks],
        seed=[x.settings["seed"] + x.number for x in tasks],
        height=s["height"],
        width=s["width"],
        steps=s["steps"],
        guidance=s["cfg"],
        guidance_interval=(s["cfg_start"], s["cfg_stop"]),
        guidance_rescale=s["rescale"],
        guidance_method=s["guidance_method"],
        guidance_options=guidance_arguments.options_of(s["guidance_options"]),
        guidance_schedule=s["guidance_schedule"],
        guide=guide if s["guidance_method"] == "autoguidance" else None,
        **solver_options(s),
        max_sequence_length=s["max_length"],
        clip_skip=s["clip_skip"],
        skip_layers=s["skip_layers"],
        skip_scale=s["skip_scale"],
        skip_start=s["skip_start"],
        skip_stop=s["skip_stop"],
    )
    # Every process gets all rows: which of them it writes or scores is decided later.
    images = multihost_utils.process_allgather(images, tiled=True)
    # (n, h, w, 3) from [0, 1]
    return pictures.to_uint8(2 * images.astype(np.float32) - 1)
