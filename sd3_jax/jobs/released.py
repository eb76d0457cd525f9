"""Released weights as config.weights names them, painting batches of tasks."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import api, pictures
from sd3_jax.jobs import prompt_lines
from sd3_jax.pipelines import bundle
from sd3_jax.pipelines.scheduler import Scheduler

log = logging.getLogger(__name__)


def load(config: ConfigDict, mesh: Mesh, **options) -> bundle.Bundle:
    """config.weights with config.sample.lora, in config.model.dtype and where
    config.quantize says so in eight bits, over the mesh."""
    own = dict(
        dtype=config.model.dtype,
        quantize=config.quantize.to_dict(),
        tokenizers_from=config.tokenizers,
        lora=config.sample.lora,
    )
    return bundle.load(config.weights, mesh=mesh, **own | options)


def load_to_paint(
    config: ConfigDict, mesh: Mesh, settings: Sequence[dict[str, Any]]
) -> bundle.Bundle:
    """load, which stops before it reads the weights if one of these settings of tasks
    asks for what the model's scheduler cannot do."""
    if "turbo" in config.weights.lower() and config.sample.cfg > 1:
        told = "config.weights = %s and config.sample.cfg = %g: turbo models are made"
        told += " for 4 steps without guidance, as configs/released.py:sd35_large_turbo"
        log.warning(told, config.weights, config.sample.cfg)
    return load(config, mesh, check=partial(check, settings=settings))


def check(scheduler: Scheduler, settings: Sequence[dict[str, Any]]) -> None:
    for s in settings:
        scheduler.sampler(s["steps"], 1_024, **times(s))


def times(settings: dict[str, Any]) -> dict[str, Any]:
    """What a task says of its solver and t's; what it leaves open is the model's."""
    return {name: settings[name] or None for name in ("solver", "grid", "shift")}


class ReleasedPainter:
    """Pictures of tasks that share a shape and settings, u8 (n, h, w, 3)."""

    def __init__(self, made: bundle.Bundle):
        self.bundle = made

    def __call__(self, rows: Sequence[prompt_lines.Task]) -> np.ndarray:
        prompts = [
            x.prompt if isinstance(x.prompt, str) else bundle.Prompt(*x.prompt)
            for x in rows
        ]
        s = rows[0].settings
        images = api.generate(
            self.bundle,
            prompts,
            negative_prompts=[x.settings["negative"] for x in rows],
            seed=[x.settings["seed"] + x.number for x in rows],
            height=s["height"],
            width=s["width"],
            steps=s["steps"],
            guidance=s["cfg"],
            guidance_interval=(s["cfg_start"], s["cfg_stop"]),
            guidance_rescale=s["rescale"],
            **times(s),
            max_sequence_length=s["max_length"],
            clip_skip=s["clip_skip"],
            skip_layers=s["skip_layers"],
            skip_scale=s["skip_scale"],
            skip_start=s["skip_start"],
            skip_stop=s["skip_stop"],
        )
        images = multihost_utils.process_allgather(images, tiled=True)
        return pictures.to_uint8(2 * images.astype(np.float32) - 1)
