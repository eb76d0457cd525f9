"""What a caller asks of ControlNets, checked and encoded as hints."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from sd3_jax.diffusion import grids
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import argument_checks, input_images
from sd3_jax.sampling.arguments import rows_of
from sd3_jax.sampling.bundle import Bundle, ControlBundle
from sd3_jax.sampling.control import require_fit
from sd3_jax.sampling.input_images import Pictures, latent_mask, pixel_mask


class ControlInput(NamedTuple):
    """A ControlNet and the image that it follows.

    `image`, one or a batch (sampling/input_images.py), is the output of the net's
    detector, or latents of it. The net acts with weight `scale` from `start` to `stop`,
    both shares of the steps. An inpainting net repaints the image where `mask` is 1.
    `preprocess` is "plain", "blur", "canny", "depth" or "inverted"; the default is the
    control type in the net's file, or "plain".
    """

    net: ControlBundle
    image: Pictures
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    mask: Pictures | None = None
    preprocess: str | None = None


def listed(
    control: ControlInput | Sequence[ControlInput] | None,
) -> list[ControlInput]:
    """The inputs in a list; UserError for what is neither one nor several."""
    if control is None or isinstance(control, ControlInput):
        return [control] if control is not None else []
    if not isinstance(control, list | tuple):
        raise UserError(
            f"control {shown(repr(control))}: expected ControlInput(net, image), or a"
            " list of these"
        )
    return list(control)


def controls_of(
    bundle: Bundle,
    controls: Sequence[ControlInput],
    grid: Float[np.ndarray, " n"],
    shape: tuple,
    rows: int,
    per_prompt: int,
) -> tuple[tuple, tuple]:
    """The nets, and for each its variables, hint, scale and window."""
    arrays = []
    for i, control in enumerate(controls):
        name = f"control {i}"
        _require_control(bundle, control, shape, name)
        hint = _hint(bundle, control, shape, name)
        hint = rows_of(hint, rows, per_prompt, f"{name}'s images")
        # start and stop are shares of the steps; the program compares times t, so that
        # the window is an array and another window does not recompile.
        window = grids.control_window(grid, control.start, control.stop)
        # A Python float has a weak type, which is part of the key of a compiled
        # program.
        scale = np.float32(control.scale)
        arrays.append((control.net.variables, hint, scale, window))
    # Residuals of several nets are summed layer by layer in one program.
    depths = [control.net.module.depth for control in controls]
    if len(set(depths)) > 1:
        raise UserError(
            f"ControlNets of {', '.join(map(str, depths))} layers together: all must"
            " have the same number, because their residuals are added layer by layer"
        )
    return tuple(control.net.module for control in controls), tuple(arrays)


def _require_control(
    bundle: Bundle, control: ControlInput, shape: tuple, name: str
) -> None:
    if not isinstance(control, ControlInput) or not isinstance(
        control.net, ControlBundle
    ):
        raise UserError(
            f"{name}: {type(control).__name__}: expected ControlInput(net, image), with"
            " the net from load_control"
        )
    for field in ("scale", "start", "stop"):
        argument_checks.number(f"{name}: {field}", getattr(control, field))
    if not 0 <= control.start < control.stop <= 1:
        raise UserError(
            f"{name}: from start {control.start} to stop {control.stop}: expected"
            " shares of the steps, 0 <= start < stop <= 1"
        )
    net, config = control.net.module, control.net.config
    denoiser = bundle.part("denoiser")
    require_fit(name, net, config, denoiser, bundle.configs["denoiser"])
    # A ControlNet has its own position table, which may be smaller than the denoiser's.
    most = net.pos_size * net.patch * bundle.factor
    if max(shape[:2]) * bundle.factor > most:
        sides = tuple(side * bundle.factor for side in shape[:2])
        raise UserError(
            f"{name}: the ControlNet's pictures have {most} pixels a side at"
            f" most, not {sides}"
        )


def _hint(bundle: Bundle, control: ControlInput, shape: tuple, name: str):
    net, image, mask = control.net.module, control.image, control.mask
    preprocess = control.preprocess or control.net.config.get("control_type", "plain")
    # Inpainting nets read the latents and one channel of mask.
    paints = net.hint_channels == shape[2] + 1  # the inpainting net
    if mask is not None and (
        not paints or input_images.are_latents(image, shape[2] + 1)
    ):
        raise UserError(f"{name}: this ControlNet takes no mask; remove it")
    if input_images.are_latents(image, net.hint_channels):
        if control.preprocess is not None:
            raise UserError(
                f"{name}: preprocess acts on pictures, but latents are given; remove it"
            )
        hint = input_images.latents(image, net.hint_channels, f"{name}'s latents")
        if hint.shape[1:3] != shape[:2]:
            raise UserError(
                f"{name}: latents of {hint.shape[1:3]}: must equal those of the"
                f" picture, {shape[:2]}"
            )
        return hint
    pixels = input_images.pixels(image, f"{name}'s image")
    sides = shape[0] * bundle.factor, shape[1] * bundle.factor
    if pixels.shape[1:3] != sides:
        raise UserError(
            f"{name}: an image of {pixels.shape[1:3]} pixels: must equal the size of"
            f" the picture, {sides}"
        )
    if paints:  # the picture left, and where it is
        return _picture_left(bundle, control, pixels, shape, name)
    # A net with other channels was trained on something that the autoencoder cannot
    # make.
    if net.hint_channels != shape[2]:
        raise UserError(
            f"{name}: this ControlNet reads {net.hint_channels} channels; give latents"
            " instead of a picture"
        )
    shift = 0.0 if net.zero_pooled else None  # as they were trained
    return bundle.encode_image(pixels, shift=shift, preprocess=preprocess)


def _picture_left(
    bundle: Bundle, control: ControlInput, pixels: Any, shape: tuple, name: str
) -> Float[Array, "b h w c"]:
    """An inpainting net's hint: latents of the picture, black where the mask is 1, and
    1 where it stays."""
    if control.mask is None:
        raise UserError(f"{name}: this ControlNet repaints; give a mask with its image")
    if control.preprocess not in (None, "plain"):
        raise UserError(
            f'{name}: preprocess "{control.preprocess}": an inpainting ControlNet has'
            " none; remove it"
        )
    # Hidden in pixels, before the autoencoder: black pixels have latents that are not
    # 0.
    hidden = pixel_mask(control.mask, shape, bundle.factor) > 0.5
    if len({len(hidden), len(pixels), 1}) > 2:
        raise UserError(
            f"{name}: {len(hidden)} masks for {len(pixels)} images; expected the same"
            " number, or one"
        )
    left = bundle.encode_image(jnp.where(hidden, 0.0, pixels))
    # The released net's extra channel is 1 where the picture stays, the opposite of the
    # caller's mask.
    keep = 1 - latent_mask(hidden, shape, bundle.factor)
    keep = np.broadcast_to(keep, (*left.shape[:3], 1))
    return jnp.concatenate([left, keep], axis=-1)
