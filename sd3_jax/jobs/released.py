"""Released weights as config.weights names them, painting batches of tasks."""

from collections.abc import Sequence

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import api, pictures
from sd3_jax.errors import UserError
from sd3_jax.jobs import prompt_lines
from sd3_jax.pipelines import bundle


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


class ReleasedPainter:
    """Pictures of tasks that share a shape and settings, u8 (n, h, w, 3)."""

    def __init__(
        self, config: ConfigDict, mesh: Mesh, made: bundle.Bundle | None = None
    ):
        self.bundle = made or load(config, mesh)

    def __call__(self, rows: Sequence[prompt_lines.Task]) -> np.ndarray:
        prompts = [
            x.prompt if isinstance(x.prompt, str) else bundle.Prompt(*x.prompt)
            for x in rows
        ]
        s = rows[0].settings
        try:
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
                solver=s["solver"],
                grid=s["grid"],
                shift=s["shift"],
                max_sequence_length=s["max_length"],
                clip_skip=s["clip_skip"],
                skip_layers=s["skip_layers"],
                skip_scale=s["skip_scale"],
                skip_start=s["skip_start"],
                skip_stop=s["skip_stop"],
            )
            images = multihost_utils.process_allgather(images, tiled=True)
            return pictures.to_uint8(2 * images.astype(np.float32) - 1)
        except ValueError as error:
            raise UserError(str(error)) from error
