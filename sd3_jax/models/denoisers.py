"""The denoisers by name; each maps (xt, t, context, pooled) to a velocity."""

from sd3_jax.models.dit import CrossDiT, DiT
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.unet import UNet
from sd3_jax.models.uvit import UViT

DENOISERS = {
    "mmdit": MMDiT,
    "dit": DiT,
    "crossdit": CrossDiT,
    "uvit": UViT,
    "unet": UNet,
}
