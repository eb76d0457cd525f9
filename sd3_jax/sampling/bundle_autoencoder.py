"""What a bundle does with its autoencoder: images to latents, and back."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import Mesh
from jaxtyping import Float, Key

from sd3_jax.errors import UserError
from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.sampling import argument_checks, compiled
from sd3_jax.sampling import autoencoder_programs as programs
from sd3_jax.sampling.control import PREPROCESS
from sd3_jax.sampling.images import input_images as inputs
from sd3_jax.sampling.images.input_images import Pictures


class Posterior(NamedTuple):
    """Mean and log-variance of the autoencoder's latents, (b, h, w, c), not scaled.

    The log-variance is clipped to [-30, 20], as in diffusers.
    """

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]


class WithAutoencoder:
    """The methods of a Bundle that need its autoencoder alone."""

    modules: dict[str, nn.Module]
    variables: dict[str, dict]
    configs: dict[str, dict]
    mesh: Mesh
    part: Any
    on_devices: Any
    finished: Any

    def encode_image(
        self,
        images: Pictures,
        key: Key[Array, "*b"] | None = None,
        *,
        noise: Float[Array | np.ndarray, "b h w c"] | None = None,
        shift: float | None = None,
        tile: int | None = None,
        preprocess: str = "plain",
    ) -> Float[Array, "b h w c"]:
        """Latents of images: a draw of the posterior; without key or noise, its mean.

        Images are floats in [0, 1], bytes or PIL images, (b, H, W, 3) or one alone
        (sampling/images/input_images.py). One key draws all rows together, a key for
        each row draws them independently; `noise` replaces the draw, and gives (mean +
        std noise - shift) scaling. `shift` replaces the autoencoder's. With `tile`,
        square tiles of that many pixels are encoded one by one, which takes less memory
        and gives slightly other latents. `preprocess` is that of a ControlNet's hint
        (sampling/control.py).
        """
        module, variables = self.part("vae"), self.variables["vae"]
        # Some ControlNets were trained on hints without the autoencoder's shift.
        scale = self.latent_scale | ({} if shift is None else {"shift": shift})
        images = self._pixels(images, preprocess)
        if noise is not None:
            # Checked on the host: in the program noise of one row would broadcast to
            # all.
            noise = self._posterior_noise(noise, key, images.shape)
        images, key, noise = compiled.place((images, key, noise), self.mesh)
        with compiled.on(self.mesh, images):
            variables = self.on_devices(variables)
            latents = programs.encode_image(
                module, variables, images, key, **scale, noise=noise, tile=tile
            )
            return self.finished(latents)

    def posterior(
        self, images: Pictures, *, tile: int | None = None, preprocess: str = "plain"
    ) -> Posterior:
        """Mean and log-variance of the autoencoder's posterior of images.

        They are the autoencoder's own, without the shift and scaling that encode_image
        applies: diffusers' `vae.encode(x).latent_dist`. The arguments are as there.
        """
        module, variables = self.part("vae"), self.variables["vae"]
        if isinstance(module, TinyAutoencoder):
            raise UserError(
                "posterior: a TAESD encodes to latents without a variance; use"
                " encode_image, or load the model's AutoencoderKL"
            )
        images = compiled.place(self._pixels(images, preprocess), self.mesh)
        with compiled.on(self.mesh, images):
            variables = self.on_devices(variables)
            moments = programs.posterior(module, variables, images, tile=tile)
            return Posterior(*self.finished(moments))

    def _pixels(self, images: Pictures, preprocess: str) -> Array | np.ndarray:
        argument_checks.choice("preprocess", preprocess, PREPROCESS)
        images = inputs.pixels(images)
        # The convolutions would drop the last rows and columns in silence.
        if any(side % self.factor for side in images.shape[1:3]):
            raise UserError(
                f"images of {images.shape[1]} x {images.shape[2]} pixels: expected"
                f" sides that are multiples of {self.factor}; crop or resize them"
            )
        return PREPROCESS[preprocess](images)

    def _posterior_noise(self, noise, key, images: tuple) -> Array | np.ndarray:
        if key is not None:
            raise UserError("key and noise: give one, because noise replaces the draw")
        noise = inputs.latents(noise, self.part("vae").latent_channels, "noise")
        b, height, width, _ = images
        sides = b, height // self.factor, width // self.factor
        if noise.shape[:3] != sides:
            raise UserError(
                f"noise of shape {tuple(noise.shape)}: expected"
                f" {(*sides, noise.shape[-1])}, that of the latents"
            )
        return noise

    def decode(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        *,
        tile: int | None = None,
    ) -> Float[Array, "b H W 3"]:
        """Latents to images in [0, 1].

        With `tile`, square tiles of that many pixels are decoded one by one, which
        takes less memory and gives slightly other images.
        """
        module, variables = self.part("vae"), self.variables["vae"]
        latents = inputs.laid_out(latents, module.latent_channels)
        latents = compiled.place(latents, self.mesh)
        with compiled.on(self.mesh, latents):
            # The next batch needs the denoiser again.
            variables = self.on_devices(variables, room=self._room(latents, tile))
            images = programs.decode(
                module, variables, latents, **self.latent_scale, tile=tile
            )
            return self.finished(images)

    def _room(self, latents: Array, tile: int | None) -> float:
        """Bytes that a device needs to decode latents, about."""
        module = self.part("vae")
        pixels = [self.factor * side for side in latents.shape[1:3]]
        height, width = (min(side, tile or side) for side in pixels)
        # At full size the first block reads the channels of the level before. In the
        # compiled decoder three such arrays are alive, here one more counts.
        channels = max(module.channels[:2])
        size = jnp.dtype(module.dtype).itemsize
        activations = 4 * len(latents) * height * width * channels * size
        weights = sum(x.nbytes for x in jax.tree.leaves(self.variables["vae"]))
        return float(activations + weights)

    @property
    def latent_scale(self) -> dict[str, float]:
        """The scaling and shift from the autoencoder's latents to the denoiser's."""
        config = self.configs["vae"]
        return {
            "scaling": config["scaling_factor"],
            # null, the default of diffusers, means latents that are not shifted.
            "shift": config["shift_factor"] or 0.0,
        }

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        # A bundle without an autoencoder still has sizes in pixels: 8 is that of all
        # published models.
        return 2 ** (len(self.part("vae").channels) - 1) if "vae" in self.modules else 8
