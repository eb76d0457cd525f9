"""Inpainting around the model: grow and blur masks, crop, add borders, paste back.

    generate(bundle, "a hat", image=photo, mask=mask, paste=True, mask_blur=8)

Pixels are handled on the host. The crop and its region are those of diffusers'
`padding_mask_crop` (VaeImageProcessor), which other tools call "only masked".
"""

import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from sd3_jax.errors import UserError
from sd3_jax.sampling import argument_checks, compiled
from sd3_jax.sampling.arguments import size
from sd3_jax.sampling.bundle import Bundle
from sd3_jax.sampling.images import input_images
from sd3_jax.sampling.images.input_images import Pictures
from sd3_jax.sampling.images.mask_shapes import (
    Box,
    acting,
    covering,
    crop_region,
    filled,
    picture_rows,
    resized,
    softened,
    to_bytes,
)

log = logging.getLogger(__name__)
MOST = 4096  # pixels of a border, a blur or a padding


class Edit(NamedTuple):
    """The inputs of the model, and what its pictures are pasted into.

    `image` and `mask` have the size that is generated; `original` and `weight`, the
    share of each painted pixel, that of the result. `regions` and `insides` say where
    each row's crop lies in the original and in the generated picture.
    """

    image: Float[ndarray, "n h w 3"]
    mask: Float[ndarray, "n h w 1"]
    original: Float[ndarray, "n H W 3"]
    weight: Float[ndarray, "n H W 1"]
    pastes: bool
    regions: list[Box] | None = None
    insides: list[Box] | None = None

    def require_fit(self, output: str, control: Any) -> None:
        """UserError for arguments of generate that do not go with the edit."""
        if self.pastes and output == "latents":
            raise UserError(
                'paste with output="latents": pixels are pasted; use output="images"'
            )
        if self.regions is not None and control:
            raise UserError(
                "crop_to_mask with control: the hints are of another area; crop the"
                " image, the mask and the hints yourself"
            )

    def finish(
        self, images: Float[Array, "b h w 3"], mesh: Mesh
    ) -> Float[Array, "b _ _ 3"]:
        """The result of each generated picture, float32.

        Pixels of weight 0 are those of the original, bit for bit.
        """
        if not self.pastes:
            return images
        # Pixels are pasted on the host, so each process needs all of them.
        whole = images.is_fully_addressable
        gathered = (
            images if whole else multihost_utils.process_allgather(images, tiled=True)
        )
        painted = np.asarray(gathered, np.float32).reshape(images.shape)
        # Pictures are ordered p0, p0, p1, p1, …: an input's pictures are neighbours.
        inputs = np.arange(len(painted)) * len(self.original) // len(painted)
        rows = [self._pasted(int(i), x) for i, x in zip(inputs, painted)]
        return compiled.place(np.stack(rows), mesh)

    def _pasted(self, i: int, painted: Float[ndarray, "h w 3"]) -> ndarray:
        original, weight = self.original[i], self.weight[i]
        if self.regions is not None and self.insides is not None:
            left, top, right, bottom = self.regions[i]
            # Bytes, as Pillow resizes pictures; only what is pasted passes through
            # them.
            inside = Image.fromarray(to_bytes(painted)).crop(self.insides[i])
            back = resized(np.asarray(inside), right - left, bottom - top)
            # Bytes have no NaN: what is not painted must not pass for a picture.
            lost = np.float32(np.nan if np.isnan(painted).any() else 0)
            painted = original.copy()
            painted[top:bottom, left:right] = back / np.float32(255) + lost
        blended = weight * painted + (1 - weight) * original
        # Not left to the arithmetic: 0 * painted + original may round.
        return np.where(weight == 0, original, blended)


def prepare(
    bundle: Bundle,
    image: Pictures | None,
    mask: Pictures | None,
    *,
    height: int | None,
    width: int | None,
    paste: Any = False,
    mask_blur: Any = 0.0,
    mask_padding: Any = 0,
    crop_to_mask: Any = None,
    outpaint: Any = None,
) -> Edit | None:
    """generate's image and mask with these options of it; None if none is set.

    The mask is padded with a border of 1 by `outpaint`, grows by `mask_padding` pixels
    and is blurred by a Gaussian of `mask_blur` pixels, in this order. `crop_to_mask` is
    the padding in pixels around the masked area that is cut out. UserError for options
    that do nothing, and for sizes that differ.
    """
    mask_blur = argument_checks.number("mask_blur", mask_blur, 0, MOST)
    mask_padding = argument_checks.whole("mask_padding", mask_padding, 0, MOST)
    if crop_to_mask is not None:
        crop_to_mask = argument_checks.whole("crop_to_mask", crop_to_mask, 0, MOST)
    border = _border(outpaint)
    asked = {
        "outpaint": border is not None,
        "paste": bool(paste),
        "mask_blur": mask_blur > 0,
        "mask_padding": mask_padding > 0,
        "crop_to_mask": crop_to_mask is not None,
    }
    # The first option that is set names the error: masks without any are generate's own
    # affair.
    first = next((name for name, is_set in asked.items() if is_set), None)
    if first is None:
        return None
    # A crop is always pasted: alone it would not be the picture that was asked for.
    pastes = bool(paste) or crop_to_mask is not None
    _require(bundle, first, image, mask, border)
    if mask_blur > 0 and not pastes:
        raise UserError(
            f"mask_blur {mask_blur:g} without paste: the blur acts where painted and"
            " original pixels are blended; set paste=True"
        )
    originals, masks = picture_rows(image, mask, border)
    masks = np.stack([softened(x, mask_padding, mask_blur) for x in masks])
    weight = masks[..., None] / np.float32(255)
    if crop_to_mask is not None:
        # height and width are those of the crop that is painted. The result has the
        # picture's, which need not be multiples of a patch.
        h, w, _ = size(bundle, height, width, None)
        sides = h * bundle.factor, w * bundle.factor
        blurs = mask_blur > 0
        return _cropped(bundle, originals, masks, weight, sides, crop_to_mask, blurs)
    if border is not None:
        _require_sides(bundle, originals.shape[1:3], border)
    # mask_padding without pasting only grows the mask, which generate then reads as it
    # reads any.
    inner = weight
    if pastes or border is not None:
        inner = covering(masks, bundle.factor)
        weight = acting(weight, masks, inner, mask_blur > 0)
    return Edit(originals, inner, originals, weight, pastes)


def _border(outpaint: Any) -> Box | None:
    if outpaint is None:
        return None
    sides = outpaint if isinstance(outpaint, list | tuple | ndarray) else [outpaint]
    if len(sides) != 4:
        raise UserError(
            f"outpaint {outpaint!r}: expected four numbers of pixels: left, top, right,"
            " bottom"
        )
    left, top, right, bottom = (
        argument_checks.whole("outpaint", side, 0, MOST) for side in sides
    )
    if not any((left, top, right, bottom)):
        raise UserError("outpaint 0, 0, 0, 0: expected a border on one side at least")
    return left, top, right, bottom


def _require_sides(bundle: Bundle, sides: tuple[int, int], border: Box) -> None:
    """UserError, with a border that fits, if a border makes sides that do not."""
    unit = bundle.factor * bundle.part("denoiser").patch
    height, width = sides
    left, top, right, bottom = border
    fitting = left, top, right + -width % unit, bottom + -height % unit
    if fitting != border:
        shown_border, shown_fit = (", ".join(map(str, x)) for x in (border, fitting))
        raise UserError(
            f"outpaint {shown_border}: the picture with its border has {height} x"
            f" {width} pixels; expected multiples of {unit}; set outpaint to"
            f" {shown_fit}"
        )


def _require(bundle: Bundle, option: str, image, mask, border: Box | None) -> None:
    """UserError if the option lacks a picture or a mask that the host can look at."""
    if image is None:
        raise UserError(f"{option} without image; give image, the picture to change")
    if mask is None and border is None:
        raise UserError(
            f"{option} without mask; give mask, white where the picture is repainted"
        )
    # A tracer has no pixels that Pillow could blur or resize.
    if any(isinstance(x, jax.core.Tracer) for x in (image, mask)):
        raise UserError(
            f"{option} inside jit: pixels are edited on the host; call it outside"
        )
    if input_images.are_latents(image, bundle.part("denoiser").channels):
        raise UserError(f"{option} with latents as image: expected pixels")


def _cropped(
    bundle: Bundle,
    originals,
    masks,
    weight,
    sides: tuple[int, int],
    padding: int,
    blurs: bool,
) -> Edit:
    """The masked areas at the size (height, width) that is generated."""
    height, width = sides
    regions, insides, crops, crop_masks = [], [], [], []
    for i, (picture, mask) in enumerate(zip(originals, masks)):
        if not mask.any():
            raise UserError(
                f"crop_to_mask: mask {i} is black; expected white where the picture is"
                " repainted"
            )
        # By the blurred mask: what it touches has to be in the crop.
        region = crop_region(mask, width, height, padding)
        left, top, right, bottom = region
        area = np.s_[top:bottom, left:right]
        # Where a picture is too small for the aspect, the crop is filled up, and
        # `inside` says what to paste back.
        crop, inside = filled(to_bytes(picture[area]), width, height)
        regions.append(region)
        insides.append(inside)
        crops.append(crop)
        crop_masks.append(filled(mask[area], width, height)[0])
    image = np.stack(crops) / np.float32(255)
    mask = covering(np.stack(crop_masks), bundle.factor)
    inner = np.zeros_like(weight)
    for i, (left, top, right, bottom) in enumerate(regions):
        cells = Image.fromarray(to_bytes(mask[i, ..., 0])).crop(insides[i])
        cells = cells.resize((right - left, bottom - top), Image.Resampling.NEAREST)
        inner[i, top:bottom, left:right, 0] = np.asarray(cells)
    weight = acting(weight, masks, inner, blurs)
    return Edit(image, mask, originals, weight, True, regions, insides)
