"""What a caller asks of ControlNets, checked and encoded as hints."""

import logging
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from sd3_jax.diffusion import grids
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.argument_checks import rows_of
from sd3_jax.sampling.control import (
    UNCONDITIONAL,
    ControlBundle,
    ControlInput,
    require_equal_depths,
    require_fit,
)
from sd3_jax.sampling.images import input_images
from sd3_jax.sampling.images.input_images import latent_mask, pixel_mask

log = logging.getLogger(__name__)
# A bundle's methods call this module, so that the class Bundle has no name here.
Bundle = Any
EVERY_TIME = np.float32(0), np.float32(1)


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


def accepted(
    control: ControlInput | Sequence[ControlInput] | None, solver: str
) -> list[ControlInput]:
    """`listed` for a solver; UserError for one that no ControlNet works with."""
    if control:
        require_solver(solver)
    return listed(control)


def require_solver(solver: str) -> None:
    """UserError for a solver that no ControlNet works with."""
    # A net acts in a window of t, which one branch of the program decides for a batch.
    if solver == "adaptive":
        raise UserError(
            "control does not work with the solver adaptive, whose images are at"
            " different times t; choose another solver, such as unipc_2"
        )


def controls_of(
    bundle: Bundle,
    controls: Sequence[ControlInput],
    grid: Float[np.ndarray, " n"],
    shape: tuple,
    rows: int,
    per_prompt: int,
    *,
    guided: bool = True,
) -> tuple[tuple, tuple]:
    """The nets, and for each the fields of a Control after its net.

    Without guidance, there is no unconditional half, which a warning says.
    """
    arrays = []
    for i, control in enumerate(controls):
        name = f"control {i}"
        _require_control(bundle, control, shape, name)
        spread = lambda x, label: rows_of(x, rows, per_prompt, label)  # noqa: B023
        hint = spread(_hint(bundle, control, shape, name), f"{name}'s images")
        # start and stop are shares of the steps; the program compares times t, so that
        # the window is an array and another window does not recompile.
        window = grids.control_window(grid, control.start, control.stop)
        # A Python float has a weak type, which is part of the key of a compiled
        # program.
        scale = np.float32(control.scale)
        uncond_hint, uncond_scale = _unconditional(bundle, control, shape, name, guided)
        if uncond_hint is not None:
            uncond_hint = spread(uncond_hint, f"{name}'s unconditional images")
        fields = hint, scale, window, uncond_hint, uncond_scale
        arrays.append((control.net.variables, *fields))
    nets = tuple(control.net.module for control in controls)
    require_equal_depths(nets)
    return nets, tuple(arrays)


def controls_at_a_time(
    bundle: Bundle, controls: Sequence[ControlInput], shape: tuple, rows: int
) -> tuple[tuple, tuple]:
    """controls_of for one evaluation, which has neither steps nor halves."""
    for i, control in enumerate(controls):
        if not isinstance(control, ControlInput):
            continue  # refused below
        if (control.start, control.stop) != (0, 1):
            raise UserError(
                f"control {i}: start {control.start} and stop {control.stop} are shares"
                " of steps, and one evaluation has none; leave them out and pass"
                " control=() at the other times"
            )
        if not _is_same(control.unconditional):
            raise UserError(
                f"control {i}: unconditional is for guidance inside generate; here give"
                " an image for each row instead"
            )
    nets, arrays = controls_of(bundle, controls, np.ones(2, np.float32), shape, rows, 1)
    # Variables, hint and scale; the window of a grid has no meaning here.
    return nets, tuple((*fields[:3], EVERY_TIME) for fields in arrays)


def block_residuals(
    value: Any, denoiser: MMDiT, shape: tuple, nets: Sequence[ControlNet]
) -> Float[Array | np.ndarray, "r b n d"]:
    """A caller's residuals, an array or a list of one (b, n, d) for each block.

    `shape` is that of the latents, (b, h, w, c); `nets` are added to them.
    """
    if isinstance(value, list | tuple):  # as diffusers' nets return them
        value = np.stack([np.asarray(x) for x in value]) if value else np.zeros(0)
    elif not hasattr(value, "shape"):
        value = np.asarray(value)
    b, h, w, _ = shape
    sizes = b, h * w // denoiser.patch**2, denoiser.width
    if value.ndim != 4 or tuple(value.shape[1:]) != sizes:
        raise UserError(
            f"residuals of shape {tuple(value.shape)}: expected (blocks,"
            f" {', '.join(map(str, sizes))}), as control_residuals returns them"
        )
    if not 1 <= len(value) <= denoiser.depth:
        raise UserError(
            f"residuals of {len(value)} blocks: expected 1 to {denoiser.depth}, the"
            " layers of the denoiser"
        )
    if nets and nets[0].depth != len(value):
        raise UserError(
            f"residuals of {len(value)} blocks beside a ControlNet of {nets[0].depth}:"
            " the numbers must be equal"
        )
    input_images.finite(value, "residuals")
    return value


def _is_same(unconditional: Any) -> bool:
    return isinstance(unconditional, str) and unconditional == "same"


def _unconditional(
    bundle: Bundle, control: ControlInput, shape: tuple, name: str, guided: bool
) -> tuple[Array | np.ndarray | None, np.float32 | None]:
    """The hint and the scale of guidance's unconditional half; None for the same."""
    half = control.unconditional
    if isinstance(half, str):
        argument_checks.choice(f"{name}: unconditional", half, UNCONDITIONAL)
    if _is_same(half):
        return None, None
    if not guided:
        log.warning(
            "%s: unconditional is not used, because guidance is off; set guidance"
            " above 1 to use it",
            name,
        )
        return None, None
    if isinstance(half, str) and half == "off":
        return None, np.float32(0)
    if isinstance(half, str):
        zeros = np.zeros((1, *shape[:2], control.net.module.hint_channels), np.float32)
        return zeros, None
    picture = control._replace(image=half)
    return _hint(bundle, picture, shape, f"{name}: unconditional"), None


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
