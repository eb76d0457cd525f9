"""Converts released weights between layouts, or a checkpoint to one of them.

With config.convert.lora_format it writes an adapter alone, in a tool's names.
"""

import dataclasses
import logging
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from etils import epath
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from sd3_jax import tree
from sd3_jax.assembly import (
    adapter_export,
    encoder_identity,
    finetune_start,
    model_parts,
)
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models import position_table
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.params import parametrization
from sd3_jax.sampling import bundle_loading, compiled, control_loading, export
from sd3_jax.sampling.bundle import TEXT, Bundle
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.sampling.job import released_sampler
from sd3_jax.sampling.schedulers.scheduler import PUBLISHED
from sd3_jax.sampling.text import prompts
from sd3_jax.weights import components, published_configs, sources

log = logging.getLogger(__name__)
OUT = {"diffusers": "diffusers", "original": "model.safetensors", "orbax": "orbax"}


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes config.convert.out, or in the workdir a path of OUT or of an adapter."""
    layout, dtype = config.convert.to, config.convert.dtype or None
    naming = config.convert.lora_format
    usual = adapter_export.OUT[naming] if naming else OUT[layout]
    out = epath.Path(config.convert.out or epath.Path(workdir) / usual)
    # Converting onto existing files would mix two models' shards.
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"config.convert.out = {out} already exists; set a new path")
    mesh = sharding.make_mesh(**config.mesh)
    with compiled.on(mesh):
        if naming:
            adapter_export.write(config, epath.Path(workdir), mesh, out)
            return
        # Known by what the file holds, before anything is taken for a model.
        path = epath.Path(config.weights).expanduser()
        if config.weights and path.exists() and sources.is_control(path):
            if config.sample.lora:
                raise UserError(
                    f"config.sample.lora: {path} is a ControlNet, expected a LoRA"
                )
            bundle = control_loading.load_stored_control(path, mesh)
        elif config.weights:
            if config.encode.weights:
                message = "config.encode.weights = %s is not used, because it completes"
                message += " a run; to join released weights, list both in"
                message += " config.weights: the later one counts where they overlap"
                log.warning(message, config.encode.weights)
            words = config.tokenizers or None  # no prompt will be encoded
            # "stored" keeps each tensor's own dtype, so that a round trip is exact.
            options = dict(dtype="stored", quantize={}, tokenizers_from=words)
            bundle = released_sampler.load(config, mesh, **options)
        else:
            bundle = trained(config, epath.Path(workdir), mesh)
        export.save(bundle, out, layout, dtype=dtype)
    if jax.process_index() == 0:
        control = isinstance(bundle, ControlBundle)
        parts = ["a ControlNet"] if control else bundle.modules
        print(f"{out}: {', '.join(parts)} in the {layout} layout")


def trained(config: ConfigDict, workdir: epath.Path, mesh: Mesh) -> Bundle:
    """The denoiser of config.sample.step or of the newest checkpoint, as a bundle, with
    the encoders of config.encode.weights. Positions, computed here, become a table."""
    parts = model_parts.build_parts(config)
    model = model_parts.mmdit(config.model, "the released layouts hold no other")
    require_released(model)
    # exact: float32 masters and not the quantized form that sampling may use.
    params, step = model_parts.trained_params(config, parts, workdir, mesh, exact=True)
    log.info("converting step %d of %s", step, workdir)
    if tower := params.get("text"):  # {} if the run reads encoded text
        warn_of_byte_tower(tower, workdir)
    variables = {
        "params": jax.jit(parametrization.arrays)(params["denoiser"])
    }  # with its LoRA
    denoiser_config = components.denoiser_config(
        model,
        sample_size=parts.shape[0],
        context_dim=config.model.context_dim,
        pooled_dim=config.model.pooled_dim,
    )
    encoders = None
    if config.encode.weights:
        trained_with = model_parts.trained_encoders(workdir, step)
        # Before the base is read, which may take minutes: encoders may not fit.
        encoders = released_encoders(config, denoiser_config, trained_with, mesh)
    if "buffers" in params:
        variables["buffers"] = params["buffers"]
        bundle = base_bundle(workdir, step, mesh, encoders)
        # The run's denoiser in place of the base's, whose configuration it keeps.
        bundle.variables["denoiser"] = variables
        return joined(bundle, encoders)
    variables["buffers"] = {"pos_embed": position_buffer(model)}
    # diffusers samples with the shift in this file, so it is the recipe's.
    scheduler = {"shift": config.sample.shift or PUBLISHED.shift}
    bundle = Bundle(
        {"denoiser": model},
        {"denoiser": variables},
        {"denoiser": denoiser_config, "scheduler": scheduler},
        {},
        mesh,
        "float32",
        str(workdir),
    )
    return joined(bundle, encoders)


def require_released(model: MMDiT) -> None:
    """UserError for a denoiser that the released layouts cannot describe."""
    # The published files have a set of weights for image tokens and one for text
    # tokens.
    if model.weight_sets != 2:
        raise UserError(
            f"config.model.weight_sets = {model.weight_sets}: the released layouts"
            " support only 2"
        )
    if model.mlp_ratio != 4:
        raise UserError(
            f"config.model.mlp_ratio = {model.mlp_ratio}: the released layouts support"
            " only 4"
        )


def base_bundle(
    workdir: epath.Path, step: int, mesh: Mesh, encoders: Bundle | None
) -> Bundle:
    """The model that a run fine-tuned, without the parts that `encoders` replaces."""
    # What else a fine-tuned model has is its base's.
    replaced = encoders.modules if encoders else ()
    return bundle_loading.load(
        finetune_start.base_of(workdir, step),
        mesh=mesh,
        dtype="stored",
        tokenizers_from=None,
        only=[name for name in components.COMPONENTS if name not in replaced],
    )


def position_buffer(model: MMDiT) -> Float[Array, "1 n d"]:
    """The model's positions as the table that diffusers' files hold."""
    # Our models compute positions; diffusers' files hold the table itself.
    size = model.pos_size
    table = position_table.positions(
        size, size, model.width, size=size, base=model.pos_base
    )
    return jnp.asarray(table, jnp.float32)[None]


def warn_of_byte_tower(tower: dict, workdir: epath.Path) -> None:
    """Warn that a run's text tower, which no released layout holds, is left out."""
    tensors = jax.tree.leaves(tower)
    message = (
        "the byte text tower of %s is not exported: no layout holds its %d tensors"
        " (%d parameters). The exported denoiser reads only that tower's embeddings, so"
        " CLIP and T5 prompts do not steer it; to generate from prompts, use sd3-jax"
        " sample --workdir=%s"
    )
    parameters = sum(x.size for x in tensors)
    log.warning(message, workdir, len(tensors), parameters, workdir)


def released_encoders(
    config: ConfigDict, denoiser: dict, trained_with: Mapping[str, str], mesh: Mesh
) -> Bundle:
    """The autoencoder and the text encoders of config.encode.weights, as stored.

    `denoiser` is its configuration, `trained_with` the fingerprints of the run's
    encoders. A run with a byte tower gets the autoencoder alone. Raises UserError if
    the encoders do not fit the denoiser.
    """
    where = f"config.encode.weights = {config.encode.weights}"
    names = ("vae",) if config.text.name == "bytes" else ("vae", *TEXT)

    def check(scheduler, configs: dict) -> None:
        encoder_configs = {name: configs[name] for name in names if name in configs}
        if not encoder_configs:
            raise UserError(
                f"{where}: has none of {', '.join(names)}; name a released model that"
                " has them, or leave it empty to export the denoiser alone"
            )
        published_configs.fit(encoder_configs | {"denoiser": denoiser}, where)

    encoders = bundle_loading.load(
        config.encode.weights,
        mesh=mesh,
        dtype="stored",
        only=names,
        # The other layouts hold no tokenizers.
        tokenizers_from=config.encode.tokenizers
        if config.convert.to == "diffusers"
        else None,
        check=check,
    )
    if trained_with:
        # The run took its fingerprints in the dtype that it encoded in.
        cast = lambda x: x.astype(config.encode.dtype)
        prints = {
            name: tree.fingerprint(jax.tree.map(cast, variables))
            for name, variables in encoders.variables.items()
        }
        encoder_identity.warn(config, trained_with, prints)
    if "t5" in encoders.modules:
        message = "trained with %d tokens of T5: pass max_sequence_length=%d to sample"
        length = config.text.length - prompts.CLIP_LENGTH
        log.info(message, length, length)
    return encoders


def joined(bundle: Bundle, encoders: Bundle | None) -> Bundle:
    """The bundle with the parts of `encoders`, which replace its own."""
    if encoders is None:
        return bundle
    names = encoders.modules
    configs = {name: encoders.configs[name] for name in names}
    words = {k: x for k, x in encoders.tokenizers.items() if k in names}
    return dataclasses.replace(
        bundle,
        modules=bundle.modules | encoders.modules,
        variables=bundle.variables | encoders.variables,
        configs=bundle.configs | configs,
        tokenizers=bundle.tokenizers | words,
        file_dtypes=bundle.file_dtypes | encoders.file_dtypes,
    )
