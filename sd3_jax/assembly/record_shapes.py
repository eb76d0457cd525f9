"""The shapes that a config fixes: its buckets, and a record's tensors in each."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from sd3_jax.config import relations
from sd3_jax.data import buckets
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.record_header import REJECTED
from sd3_jax.sampling.text.prompts import CLIP_LENGTH


def bucket_table(config: ConfigDict) -> tuple[Bucket, ...]:
    """The shapes of the recipe's pictures, in pixels."""
    image = config.image
    model = config.model
    # Sides are whole tokens of the denoiser at its coarsest level.
    unit = relations.unit(image.autoencoder, model.patch, model.multipliers)
    sides = image.height, image.width
    return buckets.table(*sides, count=image.buckets, aspect=image.aspect, unit=unit)


def tensor_shapes(config: ConfigDict, bucket: Bucket) -> dict[str, tuple[int, ...]]:
    """The recipe's shape of every tensor that a record may hold, by name."""
    model, sides = config.model, (bucket.height // 8, bucket.width // 8)
    pictures = {
        "image": (*bucket, 3),
        "moments": (*sides, 2 * model.channels),
        "latents": (*sides, model.channels),
    }
    return {
        **pictures,
        **{REJECTED + name: shape for name, shape in pictures.items()},
        "clip": (CLIP_LENGTH, model.pooled_dim),
        "t5": (max(1, config.text.length - CLIP_LENGTH), model.context_dim),
        "context": (config.text.length, model.context_dim),
        "pooled": (model.pooled_dim,),
    }


def stored_tensors(
    config: ConfigDict, bucket: Bucket, names: Iterable[str]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of those of a record's tensors that precompute stores."""
    shapes, encode = tensor_shapes(config, bucket), config.encode
    dtype = {"image": "uint8", "moments": encode.latents_dtype}
    dtype["latents"] = encode.latents_dtype
    kind = lambda name: dtype.get(name.removeprefix(REJECTED), encode.text_dtype)
    return {name: (shapes[name], kind(name)) for name in names}
