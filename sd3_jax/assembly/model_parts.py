"""Build the models and the objective that a config names."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly import compatibility, examples, finetune_start
from sd3_jax.checkpoints.integrity import UnreadableCheckpoint
from sd3_jax.checkpoints.restoring import saved_data
from sd3_jax.diffusion import formulations, timesteps
from sd3_jax.diffusion.formulations import Formulation
from sd3_jax.errors import UserError
from sd3_jax.models.denoiser import Denoiser
from sd3_jax.models.denoisers import denoiser_class
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.t5 import ByteTower
from sd3_jax.params import quantization
from sd3_jax.sampling.latents import AUTOENCODERS, Autoencoder
from sd3_jax.sampling.text import prompts
from sd3_jax.training import objectives


class Parts(NamedTuple):
    """The modules and functions that a config describes; no arrays."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    objective: objectives.Objective
    formulation: Formulation
    shape: tuple[int, int, int]  # of one image's latents
    flops: float  # of one image's forward pass
    encoders: Mapping[str, str] = MappingProxyType({})  # that weights were trained with


def build_parts(config: ConfigDict) -> Parts:
    """Build the denoiser, the autoencoder's layout and the objective; loads nothing."""
    model, autoencoder = denoiser(config.model), AUTOENCODERS[config.image.autoencoder]
    sides = (config.image.height, config.image.width)
    shape = (*(side // autoencoder.factor for side in sides), config.model.channels)
    flow = formulation(config.flow)
    objective = objectives.flow_matching(
        model,
        text_model(config),
        autoencoder,
        formulation=flow,
        dropout=config.text.dropout,
        example=examples.nominal(config),
        random_positions=config.model.pos_crop == "random",
    )
    # FLOPs count the text tokens that the denoiser sees: words of the tower of bytes.
    bytewise = config.text.name == "bytes"
    tokens = config.text.words if bytewise else config.text.length
    image_flops = model.flops(
        height=shape[0],
        width=shape[1],
        text=tokens,
        text_dim=config.model.context_dim,
    )
    return Parts(model, autoencoder, objective, flow, shape, image_flops)


def formulation(flow: ConfigDict) -> Formulation:
    density = timesteps.make(
        flow.density,
        mean=flow.mean,
        std=flow.std,
        mode_scale=flow.mode_scale,
        shift=flow.shift,
    )
    return formulations.make(flow.path, density)


def denoiser(model: ConfigDict) -> Denoiser:
    kind = denoiser_class(model.name)
    fields = {k: v for k, v in model.items() if k in kind.__dataclass_fields__}
    # SD3's rule: depth d has a width of 64 d and d heads (paper, sec. 4).
    fields["width"] = model.width or 64 * model.depth
    fields["num_heads"] = model.num_heads or model.depth
    fields["dtype"] = jnp.dtype(model.dtype)
    del fields["name"]  # linen's, not ours
    return kind(**fields)


def mmdit(model: ConfigDict, why: str) -> MMDiT:
    """The denoiser, which must be the MMDiT; UserError with the reason `why` if not."""
    if model.name != "mmdit":
        raise UserError(f'config.model.name = "{model.name}": {why}; expected "mmdit"')
    return denoiser(model)


def text_model(config: ConfigDict) -> prompts.TextModel:
    text = config.text
    if text.name == "precomputed":
        return prompts.precomputed(
            length=text.length, context_dim=config.model.context_dim
        )
    tower = ByteTower(
        depth=text.depth,
        width=text.width,
        num_heads=text.num_heads,
        words=text.words,
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
        unroll=config.model.unroll,
        dtype=jnp.dtype(config.model.dtype),
    )
    return prompts.trained(tower)


def checkpoints(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / finetune_start.CHECKPOINTS


def trained_encoders(workdir: epath.PathLike, step: int) -> dict[str, str]:
    """Fingerprints of the encoders that a checkpoint was trained with, by part."""
    return saved_data(checkpoints(workdir), step).get("encoders", {})


def trained_guide(
    config: ConfigDict, parts: Parts, workdir: str, mesh: Mesh
) -> dict | None:
    """The parameters of the checkpoint that config.sample.guide names, if any."""
    guide = config.sample.guide
    if not guide:
        return None
    if not guide.isdecimal() or not int(guide):
        raise UserError(
            f"config.sample.guide = {guide}: expected the step of a checkpoint of this"
            " run, such as 1000"
        )
    return trained_params(config, parts, workdir, mesh, int(guide))[0]


def trained_params(
    config: ConfigDict,
    parts: Parts,
    workdir: str,
    mesh: Mesh,
    step: int | None = None,
    *,
    exact: bool = False,
):
    """Restore a checkpoint's weights into their shardings, and its step.

    The step is `step`, else config.sample.step, else the newest sound one. After
    fine-tuning the frozen weights are included. The denoiser is quantized if
    config.quantize says so, unless `exact`.
    """
    folder, which = checkpoints(workdir), config.sample.weights
    step = step or config.sample.step or None
    saved_config: dict = {}

    try:
        params, step = finetune_start.restored(
            *(
                config,
                parts.objective,
                parts.denoiser,
                folder,
                mesh,
                saved_config.update,
            ),
            which=which,
            step=step,
        )
    except UserError as error:
        differing = compatibility.differing(saved_config, config)
        if isinstance(error, UnreadableCheckpoint) or not differing:
            raise
        # The cause and not the shapes: most often the run was of another variant.
        raise UserError(
            f"{workdir} was trained with other settings:"
            f" {compatibility.spelled(differing)}; use the recipe and variant of that"
            " run"
        ) from error
    compatibility.warn(workdir, saved_config, config)
    if config.quantize.denoiser and not exact:
        quantization.require_units(config.quantize.denoiser, mesh.devices.flat[0])
        kind = quantization.KINDS[config.quantize.denoiser]
        params["denoiser"] = quantization.replaced(
            params["denoiser"], kind, quantization.quantize_placed
        )
    return params, step
