"""A caller's mask over pixels, and over latents."""

import numpy as np
from jaxtyping import Float

from sd3_jax.errors import UserError
from sd3_jax.sampling import input_images
from sd3_jax.sampling.input_images import Pictures


def latent_mask(
    mask: Pictures, shape: tuple, factor: int
) -> Float[np.ndarray, "b h w 1"]:
    """1 where the mask is at least 0.5 at the first pixel of each latent."""
    # Binary, and by the first pixel, as PyTorch's nearest interpolation shrinks a mask.
    return (pixel_mask(mask, shape, factor)[:, ::factor, ::factor] >= 0.5).astype(
        np.float32
    )


def pixel_mask(
    mask: Pictures, shape: tuple, factor: int
) -> Float[np.ndarray, "b H W 1"]:
    mask = input_images.mask(mask)
    sides = shape[0] * factor, shape[1] * factor
    if mask.shape[1:3] != sides:
        raise UserError(
            f"mask of {mask.shape[1:3]} pixels: the picture has {sides}; wanted the"
            " same"
        )
    return mask
