"""What draws the previews of a call, checked."""

from typing import Any

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.compiled import Plan


def with_decoder(plan: Plan, decoder: Bundle | None) -> tuple[Plan, tuple | None]:
    """The plan with the decoder's module, and its weights, for compiled.sample."""
    if decoder is None:
        return plan, None
    # The module is static, its weights are data: another TAESD of this shape compiles
    # nothing.
    plan = plan._replace(previewer=decoder.part("vae"))
    return plan, (decoder.variables["vae"], decoder.latent_scale)


def require_decoder(bundle: Bundle, decoder: Any, preview: Any) -> None:
    """UserError for a decoder that previews of this bundle's latents cannot have."""
    if decoder is None:
        return
    if not isinstance(decoder, Bundle):
        raise UserError(f"preview_decoder {shown(repr(decoder))}: expected a Bundle")
    if preview is None:
        raise UserError("preview_decoder without preview: set preview, a function")
    ours, theirs = bundle.part("denoiser").channels, decoder.part("vae").latent_channels
    if ours != theirs:
        raise UserError(
            f"preview_decoder {decoder.source}: its latents have {theirs} channels, the"
            f" denoiser's {ours}; load that of the model's family, such as TAESD3"
        )
    # One program decodes and denoises, on one mesh, in every step.
    if decoder.mesh != bundle.mesh or decoder.placement != "all":
        raise UserError(
            f"preview_decoder {decoder.source}: load it with mesh=bundle.mesh and"
            ' placement="all"'
        )
