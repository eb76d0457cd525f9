"""Floating-point operations of a forward pass, counted by hand: 2 a multiply-add.

XLA's own count sees a scanned block once and a kernel of ours as nothing, so model
FLOPs, and the utilisation made of them, are analytic (as for any published MFU).
"""

from sd3_jax.models.mmdit import MMDiT


def mmdit(model: MMDiT, *, height: int, width: int, text: int, text_dim: int) -> float:
    """One image through the denoiser: latent sides in latents, `text` tokens."""
    d, p = model.width, model.patch
    n = (height // p) * (width // p)
    token = 2 * (4 + 2 * model.mlp_ratio) * d**2  # qkv, out and the two of the MLP
    image = model.depth * token * n
    words = ((model.depth - 1) * token + 2 * 3 * d**2) * text  # the last has qkv only
    joint = 4 * d * ((model.depth - 1) * (n + text) ** 2 + n * (n + text))
    dual = model.dual_blocks * (8 * d**2 * n + 4 * d * n**2 + 6 * d**2)
    vectors = 2 * d**2 * (12 * model.depth - 4 + 2 + 2) + 2 * 256 * d
    ends = 4 * n * p**2 * model.channels * d + 2 * text * text_dim * d
    return float(image + words + joint + dual + vectors + ends)
