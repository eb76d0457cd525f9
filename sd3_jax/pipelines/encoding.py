"""Pictures and captions to what training reads, by a released model's encoders.

`precompute` and `train` call the same programs, so that what is computed before
training and what is computed in it are the same bits.
"""

from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Key, UInt8

from sd3_jax import sharding
from sd3_jax.errors import UserError
from sd3_jax.models import vae
from sd3_jax.pipelines import latents, programs, prompts
from sd3_jax.pipelines.bundle import TEXT, Bundle
from sd3_jax.pipelines.prompts import TextModels

FORMS = ("moments", "latents")


class Encoder:
    """A bundle's autoencoder and text encoders, as a batch of training wants them.

    `form` is "moments", of which training draws other latents at each step, or
    "latents", drawn once. `length` is all tokens of text, of which CLIP has 77. What is
    kept is of `latents_dtype` and `text_dtype`.
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
    ):
        self.bundle, self.form = bundle, form
        self.cut = Counter()  # captions of which an encoder does not read all
        self._t5_length = length - prompts.CLIP_LENGTH
        if self._t5_length < 1 and any(name in bundle.modules for name in TEXT):
            raise UserError(
                f"config.text.length = {length}: wanted more than CLIP's"
                f" {prompts.CLIP_LENGTH}, T5's tokens following them"
            )
        placed = sharding.batch_sharding(bundle.mesh)
        scale = bundle.latent_scale if "vae" in bundle.modules else {}
        models = TextModels(*(bundle.modules.get(name) for name in TEXT))

        def picture(variables, image, keys):
            module = bundle.modules["vae"]
            found = module.apply(variables, latents.pixels(image), method="encode")
            found = latents.scaled(found, **scale)
            if form == "latents":
                found = jax.vmap(vae.sample)(keys, found)
            return found.astype(latents_dtype)

        def text(variables, ids):
            found = prompts.encode_released(
                models,
                variables,
                ids,
                context_dim=context_dim,
                pooled_dim=pooled_dim,
                length=self._t5_length,
            )
            return jax.tree.map(lambda x: x.astype(text_dtype), found)

        self._picture = jax.jit(picture, out_shardings=placed)
        self._text = jax.jit(text, out_shardings=placed)

    def tokenize(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Ids by encoder; what they do not read to its end is counted in `cut`."""
        return self.bundle.token_ids(captions, self._t5_length, cut=self.cut)

    def picture(
        self, image: UInt8[Array, "b H W 3"], keys: Key[Array, " b"] | None = None
    ) -> dict[str, Array]:
        """{form: (b, H/8, W/8, c)} of images over the mesh; a key a row for a draw."""
        with programs.on(self.bundle.mesh):
            found = self._picture(self.bundle.variables["vae"], image, keys)
        return {self.form: found}

    def check(self) -> None:
        """ValueError or TypeError if the text encoders' widths are not as they must be:
        before any program is compiled."""
        variables = {name: self.bundle.variables.get(name) for name in TEXT}
        with programs.on(self.bundle.mesh):
            jax.eval_shape(self._text, variables, self.tokenize([""]))

    def text(self, ids: dict[str, Array]) -> dict[str, Array]:
        """context (b, length, context_dim) and pooled (b, pooled_dim)."""
        variables = {name: self.bundle.variables.get(name) for name in TEXT}
        with programs.on(self.bundle.mesh):
            return self._text(variables, ids)._asdict()

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """A batch in which pictures and token ids have become what they stand for."""
        ids = {name: x for name, x in batch.items() if name.startswith("ids_")}
        made = {name: x for name, x in batch.items() if name not in ids}
        if "image" in made:
            made |= self.picture(made.pop("image"))
        return made | (self.text(ids) if ids else {})
