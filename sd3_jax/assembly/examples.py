"""The examples of a run: their source, loader, batch shapes and encoder."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sd3_jax.assembly.record_shapes import tensor_shapes
from sd3_jax.assembly.stored_records import (
    batch_size,
    check_held_out,
    open_records,
    to_encode,
)
from sd3_jax.config import relations
from sd3_jax.data import tokenizers
from sd3_jax.data.buckets import Bucket
from sd3_jax.data.dataset import Records
from sd3_jax.data.digits import Digits
from sd3_jax.data.loader import Loader
from sd3_jax.data.record_header import REJECTED
from sd3_jax.data.synthetic import Synthetic
from sd3_jax.errors import UserError, nearest
from sd3_jax.sampling import bundle_loading
from sd3_jax.sampling.bundle import TEXT
from sd3_jax.sampling.text.encoder import Encoder


def source(config: ConfigDict, *, held_out: bool = False):
    """The training examples, or those held out for validation.

    Records are checked at once, before anything is compiled: every shard is opened,
    held-out ones too, and the first record read. UserError if something is wrong.
    """
    if config.image.buckets > 1 and config.data.name in relations.READS:
        raise UserError(
            f"config.image.buckets = {config.image.buckets}: must be 1, because"
            f' config.data.name = "{config.data.name}" has pictures of one shape; or'
            " set --config.data.name=records"
        )
    # Made-up data has no files to set apart: validation draws from another seed.
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
            pairs=config.tune.objective == "dpo",
            sets=config.tune.prior > 0,
        )
    if config.data.name == "records":
        records = open_records(config, held_out=held_out)
        # Now, not at the first validation, which may be hours away.
        if not held_out:
            check_held_out(config, records)
        return records
    raise UserError(
        f'config.data.name = "{config.data.name}"'
        f"{nearest(config.data.name, ('digits', 'synthetic', 'records'))}"
    )


def by_bucket(source) -> str:
    """Each bucket's share of steps, "48x64 31.0%, 64x64 69.0%"; "" for one bucket."""
    if not isinstance(source, Records) or len(source.buckets) == 1:
        return ""
    weights = {b.name: sum(s.weight for s in b.sets) for b in source.buckets}
    total = sum(weights.values())
    return ", ".join(f"{name} {x / total:.1%}" for name, x in weights.items())


def encoder_of(config: ConfigDict, source, mesh: Mesh) -> Encoder | None:
    """The encoder that a source's batches still have to go through, if any."""
    fields = source.fields if isinstance(source, Records) else ()
    parts = to_encode(config, fields)
    return encoder(config, mesh, parts) if parts else None


def encoder(
    config: ConfigDict, mesh: Mesh, only: list[str], form: str = "moments"
) -> Encoder:
    """Load config.encode's encoders over the mesh; UserError if they do not fit the
    model. The denoiser sees zeros for a text encoder that the weights lack."""
    encode, model = config.encode, config.model
    bundle = bundle_loading.load(
        encode.weights,
        mesh=mesh,
        dtype=encode.dtype,
        tokenizers_from=encode.tokenizers,
        only=only,
        embeddings=config.sample.embeddings if set(only) & set(TEXT) else (),
        quantize={"t5": config.quantize.t5},
    )
    # A recipe's shapes assume 8 pixels a latent; another autoencoder is another model.
    if "vae" in only:
        layout = bundle.part("vae").latent_channels, bundle.factor
        if layout != (model.channels, 8):
            raise UserError(
                f"config.encode.weights = {encode.weights}: its autoencoder has"
                f" {layout[0]} channels and {layout[1]} pixels a latent; expected"
                f" config.model.channels = {model.channels} and 8 pixels"
            )
    result = Encoder(
        bundle,
        form=form,
        latents_dtype=encode.latents_dtype,
        text_dtype=encode.text_dtype,
        length=config.text.length,
        context_dim=model.context_dim,
        pooled_dim=model.pooled_dim,
        rows=encode.rows,
    )
    if any(name in bundle.modules for name in TEXT):
        try:
            result.check()  # shapes alone: traced, not compiled
        except (ValueError, TypeError) as error:
            raise UserError(
                f"config.encode.weights = {encode.weights}: its text encoders do not"
                f" fit config.model.context_dim = {model.context_dim} and pooled_dim ="
                f" {model.pooled_dim}: {error}"
            ) from error
    # Captions are to be encoded: without any text encoder all of them would be zeros.
    elif only != ["vae"]:
        raise UserError(
            f"config.encode.weights = {encode.weights}: has no text encoder; name a"
            " released model that has one"
        )
    return result


def loader(
    config: ConfigDict,
    rows: np.ndarray,
    *,
    start: int = 0,
    ahead: int = 0,
    examples=None,
    encoder: Encoder | None = None,
    held_out: bool = False,
) -> Loader:
    """This process's rows of each batch; of `examples` if the source is at hand."""
    return Loader(
        examples or source(config, held_out=held_out),
        batch_size=batch_size(config, held_out=held_out),
        rows=rows,
        tokenize=tokenizer(config, encoder),
        start=start,
        ahead=ahead,
        threads=config.data.threads,
        prefetch=config.data.prefetch,
    )


def nominal(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of a batch as the recipe has it, for tracing."""
    b, text = config.data.batch_size, config.text
    shapes_of = tensor_shapes(config, Bucket(config.image.height, config.image.width))
    pixels = config.image.autoencoder == "pixels"
    batch = {"image": np.uint8} if pixels else {"latents": np.float32}
    if config.tune.objective == "dpo":
        batch |= {REJECTED + name: dtype for name, dtype in batch.items()}
    if text.name != "bytes":
        batch |= {"context": np.float32, "pooled": np.float32}
    batch_shapes = {
        k: jax.ShapeDtypeStruct((b, *shapes_of[k]), dtype) for k, dtype in batch.items()
    }
    if config.tune.prior:
        batch_shapes["set"] = jax.ShapeDtypeStruct((b,), np.int32)
    if text.name == "bytes":
        batch_shapes["ids_bytes"] = jax.ShapeDtypeStruct((b, text.length), np.int32)
    return batch_shapes


def tokenizer(config: ConfigDict, encoder: Encoder | None) -> Callable:
    """The function from captions to a batch's ids."""
    if encoder is not None:
        return encoder.tokenize
    return functools.partial(tokenizers.bytes_of, length=config.text.length)


def batches(
    config: ConfigDict, source, encoder: Encoder | None = None
) -> list[dict[str, np.ndarray]]:
    """A batch of zeros of each bucket, with the loader's shapes and dtypes."""
    # For compiling every bucket's step ahead: a new shape in the middle of a run would
    # stop all processes for a compile.
    size = config.data.batch_size
    if not isinstance(source, Records):
        return [zeros(nominal(config))]
    captioned = "caption" in source.fields
    other_fields = tokenizer(config, encoder)([""] * size) if captioned else {}
    other_fields |= {"set": np.zeros(size, np.int32)} if "set" in source.fields else {}
    return [
        {
            name: np.zeros((size, *shape), dtype)
            for name, (shape, dtype) in source.example(bucket).items()
        }
        | other_fields
        for bucket in source.buckets
    ]


def zeros(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    return {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
