"""The denoisers by name; each maps (xt, t, context, pooled) to a velocity."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd3_jax.models.denoiser import Denoiser

# Module of models/ and class. As text, so that the config's schema has the names
# without an import of JAX.
DENOISERS = {
    "mmdit": ("mmdit", "MMDiT"),
    "dit": ("dit", "DiT"),
    "crossdit": ("dit", "CrossDiT"),
    "uvit": ("uvit", "UViT"),
    "unet": ("unet", "UNet"),
}


def denoiser_class(name: str) -> type["Denoiser"]:
    """The class of a denoiser; KeyError for an unknown name."""
    module, kind = DENOISERS[name]
    return getattr(importlib.import_module(f"sd3_jax.models.{module}"), kind)
