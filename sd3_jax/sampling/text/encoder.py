"""Pictures and captions to latents and text embeddings, for precompute and train.

Both jobs call the same programs, so that precomputed values and those computed during
training are bit-identical.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key, UInt8

from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models import vae
from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.sampling import compiled, latents
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.text import prompts

IMAGES = ("image", "rejected_image")


class Encoder:
    """A bundle's autoencoder and text encoders, for batches of training.

    `form` is "moments", from which training draws latents at each step, or "latents",
    drawn once. `length` counts all text tokens, of which CLIP has 77. Results have
    `latents_dtype` and `text_dtype`. An empty caption is encoded as zeros, as dropout
    and guidance have it. Programs take `rows` examples a device, whatever the batch
    size, because another number of rows may round differently.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        form: str = "moments",
        latents_dtype: str = "float16",
        text_dtype: str = "bfloat16",
        length: int = 154,
        context_dim: int = 4096,
        pooled_dim: int = 2048,
        rows: int = 8,
    ):
        _require_variance(bundle)
        self.bundle, self.form, self.rows = bundle, form, rows
        self.shards = sharding.batch_shards(bundle.mesh)
        self.context_dim = context_dim
        self.cut = Counter()  # captions of which an encoder does not read all
        self._t5_length = length - prompts.CLIP_LENGTH
        if self._t5_length < 1 and any(bundle.text_models):
            raise UserError(
                f"config.text.length = {length}: must be more than the"
                f" {prompts.CLIP_LENGTH} tokens of CLIP, which precede those of T5"
            )
        placed = sharding.batch_sharding(bundle.mesh)
        scale = bundle.latent_scale if "vae" in bundle.modules else {}
        models = bundle.text_models
        # A caption counts as empty when every encoder's ids are those of "".
        empty = bundle.token_ids([""], self._t5_length) if any(models) else {}

        # The weights are arguments of the jitted functions: as closures they would be
        # constants of the program.
        def picture(variables, image, keys):
            module = bundle.modules["vae"]
            encoded = module.apply(variables, latents.pixels(image), method="encode")
            # Moments are scaled before they are rounded to latents_dtype, so that what
            # is stored is in the denoiser's units.
            encoded = latents.scaled(encoded, **scale)
            if form == "latents":
                encoded = jax.vmap(vae.sample)(keys, encoded)
            # Rounded inside the program, so that precompute and train round alike.
            return encoded.astype(latents_dtype)

        def text(variables, ids):
            encoded = prompts.encode_parts(
                models, variables, ids, pooled_dim=pooled_dim
            )
            # Records have a fixed width, which wider states than pooled would pass.
            clip = prompts.filled(encoded.clip, pooled_dim, "pooled_dim")
            encoded = encoded._replace(clip=clip)
            differ = [jnp.any(x != empty[name], axis=1) for name, x in ids.items()]
            encoded = prompts.nulled(encoded, jnp.any(jnp.stack(differ), axis=0))
            return jax.tree.map(lambda x: x.astype(text_dtype), encoded)

        self._picture = jax.jit(picture, out_shardings=placed)
        self._text = jax.jit(text, out_shardings=placed)
        # `device_rows` is static, because it sets the shapes of the joined batch.
        join = partial(joined, shards=self.shards)
        self._join = jax.jit(join, static_argnums=1, out_shardings=placed)

    @property
    def encodes_all(self) -> bool:
        """Whether it has the autoencoder and text encoders, and not one of the two."""
        return "vae" in self.bundle.modules and any(self.bundle.text_models)

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Ids by encoder; truncated captions are counted in `cut`."""
        return self.bundle.token_ids(captions, self._t5_length, cut=self.cut)

    def picture(
        self, image: UInt8[Array, "b H W 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[str, Array]:
        """{form: (b, H/8, W/8, c)} of images over the mesh; a key a row for a draw."""
        with compiled.on(self.bundle.mesh):
            encoded = self._picture(self.bundle.variables["vae"], image, keys)
        return {self.form: encoded}

    def check(self) -> None:
        """ValueError or TypeError if the text encoders have the wrong widths, before
        any program is compiled."""
        ids = self.tokenize([""] * self.shards)
        with compiled.on(self.bundle.mesh):
            encoded = jax.eval_shape(self._text, self.bundle.text_variables, ids)
            jax.eval_shape(
                partial(prompts.put_together, length=1, context_dim=self.context_dim),
                *encoded,
            )

    def text(self, ids: dict[str, Array]) -> dict[str, Array]:
        """clip (b, 77, pooled_dim), t5 (b, length - 77, context_dim) if there is one,
        and pooled (b, pooled_dim); put_together joins them."""
        with compiled.on(self.bundle.mesh):
            encoded = self._text(self.bundle.text_variables, ids)._asdict()
        # Without T5 a record has no "t5", and put_together fills in zeros.
        return {name: x for name, x in encoded.items() if x is not None}

    def __call__(
        self, rows: dict[str, np.ndarray], batch_size: int
    ) -> dict[str, Array]:
        """This process's rows of a batch, as loaded, to the batch over the mesh, with
        pictures and token ids encoded."""
        # Latents and encoded text that the records already hold are passed through.
        raw = {k: x for k, x in rows.items() if k in IMAGES or k.startswith("ids_")}
        other_fields = {name: x for name, x in rows.items() if name not in raw}
        device_rows = batch_size // self.shards  # a device's
        parts = []
        # Encoders run in programs of a fixed row count, whatever the batch size: XLA
        # may pick other kernels, and so other roundings, for another shape.
        for start in range(0, device_rows, self.rows):
            part = {k: cut(x, device_rows, start, self.rows) for k, x in raw.items()}
            # A global batch of `rows` on each device
            size = self.rows * self.shards
            parts.append(self._encode(sharding.put(part, self.bundle.mesh, size)))
        encoded = self._join(parts, device_rows)
        return sharding.put(other_fields, self.bundle.mesh, batch_size) | encoded

    def _encode(self, batch: dict[str, Array]) -> dict[str, Array]:
        ids = {name: x for name, x in batch.items() if name not in IMAGES}
        encoded = self.text(ids) if ids else {}
        for name in [name for name in IMAGES if name in batch]:
            for form, x in self.picture(batch[name]).items():
                encoded[name.removesuffix("image") + form] = x
        return encoded


def _require_variance(bundle: Bundle) -> None:
    """UserError for an autoencoder whose moments cannot be stored."""
    if isinstance(bundle.modules.get("vae"), TinyAutoencoder):
        raise UserError(
            f"{bundle.source}: a TAESD encodes to latents without a variance; name a"
            " model with its AutoencoderKL to encode records"
        )


def cut(x: np.ndarray, device_rows: int, start: int, rows: int) -> np.ndarray:
    """Rows from `start` on of each device, which has `own`; zero-padded to `rows`."""
    # (devices * device_rows, …) → (devices, rows, …): a device's rows stay on the
    # device.
    x = x.reshape(-1, device_rows, *x.shape[1:])[:, start : start + rows]
    missing = [(0, 0), (0, rows - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]
    return np.pad(x, missing).reshape(-1, *x.shape[2:])


def joined(parts: Sequence[dict[str, Array]], device_rows: int, shards: int) -> dict:
    """The inverse of `cut` for the encoded parts; nothing moves between devices."""

    def leaf(*xs):
        # (shards * rows, …) → (shards, rows, …); concatenating on axis 1 moves nothing
        # between devices. Rows that `cut` padded are dropped at the end.
        xs = [x.reshape(shards, -1, *x.shape[1:]) for x in xs]
        whole = jnp.concatenate(xs, axis=1)[:, :device_rows]
        return whole.reshape(-1, *whole.shape[2:])

    return jax.tree.map(leaf, *parts)
