"""From a config to the things it names; below this, nobody sees a config."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax import sharding, tree
from sd3_jax.data import tokenizers
from sd3_jax.data.digits import Digits
from sd3_jax.data.loader import Loader
from sd3_jax.data.mixture import Records
from sd3_jax.data.synthetic import Synthetic
from sd3_jax.diffusion import timesteps
from sd3_jax.diffusion.paths import PATHS
from sd3_jax.errors import UserError, nearest
from sd3_jax.jobs import resume
from sd3_jax.models import flops
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.t5 import ByteTower
from sd3_jax.pipelines import prompts
from sd3_jax.pipelines.latents import AUTOENCODERS, Autoencoder
from sd3_jax.training import objectives
from sd3_jax.training.checkpoint import restore_params, saved_config


class Parts(NamedTuple):
    """What a config describes, built; nothing here holds an array."""

    denoiser: nn.Module
    autoencoder: Autoencoder
    objective: objectives.Objective
    shape: tuple[int, int, int]  # of one image's latents
    flops: float  # of one image's forward pass


def parts(config: ConfigDict) -> Parts:
    denoiser, autoencoder = mmdit(config.model), AUTOENCODERS[config.image.autoencoder]
    sides = (config.image.height, config.image.width)
    shape = (*(side // autoencoder.factor for side in sides), config.model.channels)
    objective = objectives.flow_matching(
        denoiser,
        text_model(config),
        autoencoder,
        path=PATHS[config.flow.path](),
        density=timesteps.make(
            config.flow.density,
            mean=config.flow.mean,
            std=config.flow.std,
            mode_scale=config.flow.mode_scale,
            shift=config.flow.shift,
        ),
        dropout=config.text.dropout,
        example=example(config),
    )
    bytewise = config.text.name == "bytes"
    tokens = config.text.words if bytewise else config.text.length
    image_flops = flops.mmdit(
        denoiser,
        height=shape[0],
        width=shape[1],
        text=tokens,
        text_dim=config.model.context_dim,
    )
    return Parts(denoiser, autoencoder, objective, shape, image_flops)


def mmdit(model: ConfigDict) -> MMDiT:
    fields = {k: v for k, v in model.items() if k in MMDiT.__dataclass_fields__}
    fields["width"] = model.width or 64 * model.depth
    fields["num_heads"] = model.num_heads or model.depth
    fields["dtype"] = jnp.dtype(model.dtype)
    del fields["name"]  # linen's, not ours
    return MMDiT(**fields)


def text_model(config: ConfigDict) -> prompts.TextModel:
    text = config.text
    if text.name == "precomputed":
        return prompts.precomputed()
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


def source(config: ConfigDict, *, held_out: bool = False):
    """The training examples, or those set apart for validation.

    Making it looks at every shard of records, held out ones too, and at the first
    record: a UserError then, before anything is compiled.
    """
    seed = config.seed + (2**31 if held_out else 0)
    size = dict(height=config.image.height, width=config.image.width)
    if config.data.name == "digits":
        easy = 0 if held_out else config.data.easy
        mix = tuple(config.data.mix)
        return Digits(**size, mix=mix, easy=easy, seed=seed, held_out=held_out)
    if config.data.name == "synthetic":
        return Synthetic(
            **size,
            channels=config.model.channels,
            text_length=config.text.length,
            context_dim=config.model.context_dim,
            pooled_dim=config.model.pooled_dim,
            seed=seed,
        )
    if config.data.name == "records":
        found = stored(config, held_out=held_out)
        if not held_out:
            check_held_out(config, found)
        return found
    raise UserError(
        f'config.data.name = "{config.data.name}"'
        f"{nearest(config.data.name, ('digits', 'synthetic', 'records'))}"
    )


def stored(config: ConfigDict, *, held_out: bool) -> Records:
    """Records of the recipe's shapes, as many as a batch, or a validation, takes."""
    data, size = config.data, config.data.batch_size
    key, paths, weights = "data.records", data.records, data.weights
    least, by = size, f"of config.data.batch_size = {size}"
    if held_out:
        key, paths, weights = "data.held_out", data.held_out, ()
        least = max(1, config.eval.examples // size) * size
        by = f"for validation by config.eval.examples = {config.eval.examples}"
    try:
        found = Records(
            tuple(paths),
            weights=tuple(weights),
            shapes={name: x.shape[1:] for name, x in example(config).items()},
            bad_records=data.bad_records,
            seed=config.seed,
        )
    except UserError as error:
        raise UserError(f"config.{key}: {error}") from None
    for one in found.sets:
        share = one.weight / sum(other.weight for other in found.sets)
        wanted = math.ceil(least * share - 1e-6)
        if len(one.numbers) < wanted:
            raise UserError(
                f"config.{key}: {one.name}: {len(one.numbers)} records, wanted at least"
                f" {wanted}, its part {by}"
            )
    for name, x in found.first.tensors.items():
        if x.shape != found.shapes[name]:
            raise UserError(
                f"config.{key}: {found.shards[0].path}: {name} of {by_x(x.shape)}, the"
                f" recipe's are {by_x(found.shapes[name])}: {MADE[name](config, x)}"
            )
    return found


def by_x(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


MADE = {  # what makes the shapes of the recipe, and what of the records
    "latents": lambda c, x: (
        f"config.image.height x width = {c.image.height} x {c.image.width}, config."
        f"model.channels = {c.model.channels}; the records were made at"
        f" {8 * x.shape[0]} x {8 * x.shape[1]}"
    ),
    "context": lambda c, x: (
        f"config.text.length = {c.text.length}, config.model.context_dim ="
        f" {c.model.context_dim}"
    ),
    "pooled": lambda c, x: f"config.model.pooled_dim = {c.model.pooled_dim}",
}


def check_held_out(config: ConfigDict, trained_on: Records) -> None:
    """Validation, if a run comes to it, has records, and training has none of them."""
    if not config.data.held_out:
        if config.train.eval_every > config.train.steps:
            return
        raise UserError(
            "config.data.held_out = (): wanted shards for validation, or config.train."
            f"eval_every over config.train.steps = {config.train.steps}"
        )
    files = {shard.file for shard in trained_on.shards}
    for shard in stored(config, held_out=True).shards:
        if shard.file in files:
            raise UserError(
                f"config.data.held_out: {shard.path} is one of config.data.records too"
            )


def loader(
    config: ConfigDict,
    rows: slice,
    *,
    start: int = 0,
    held_out: bool = False,
    made=None,
) -> Loader:
    """This process's rows; `made` is the source, if it has been made."""
    return Loader(
        made or source(config, held_out=held_out),
        batch_size=config.data.batch_size,
        rows=rows,
        text_length=config.text.length,
        start=start,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


def example(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch, without its examples."""
    b, height, width = config.data.batch_size, config.image.height, config.image.width
    if config.data.name == "digits":
        shapes = {
            "image": ((b, height, width, 3), np.uint8),
            "ids_bytes": ((b, config.text.length), np.int32),
        }
    else:
        model = config.model
        shapes = {
            "latents": ((b, height // 8, width // 8, model.channels), np.float32),
            "context": ((b, config.text.length, model.context_dim), np.float32),
            "pooled": ((b, model.pooled_dim), np.float32),
        }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def token_ids(config: ConfigDict, captions: list[str]) -> dict[str, np.ndarray]:
    """The captions as a batch's ids, for the text model of a recipe to encode."""
    if config.text.name != "bytes":
        raise UserError(
            f'config.text.name = "{config.text.name}": prompts need a text encoder, and'
            ' this recipe reads embeddings that were computed before; wanted "bytes"'
        )
    ids = [tokenizers.byte_ids(caption, config.text.length) for caption in captions]
    return {"ids_bytes": np.stack(ids)}


def checkpoints(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / "checkpoints"


def trained_params(config: ConfigDict, made: Parts, workdir: str, mesh: Mesh):
    """The newest checkpoint's weights, straight into their shardings, and its step."""
    boxed = jax.eval_shape(made.objective.init, jax.random.key(0))
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree.unbox(boxed),
        sharding.shardings(boxed, mesh),
    )
    folder = checkpoints(workdir)
    params, step = restore_params(folder, abstract, which=config.sample.weights)
    resume.warn(workdir, saved_config(folder, step), config)
    return params, step
