"""Shapes of masks and crops: growth, blur, the region of a crop, and its size.

All act on bytes on the host, with Pillow's filters, as diffusers' VaeImageProcessor.
"""

import logging
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image, ImageFilter

from sd3_jax.errors import UserError
from sd3_jax.sampling.images import input_images

log = logging.getLogger(__name__)
Box = tuple[int, int, int, int]  # left, top, right, bottom


def crop_region(
    mask: UInt8[ndarray, "h w"], width: int, height: int, padding: int
) -> Box:
    """The box of the masked area with padding, grown to the aspect of width x height.

    It does not leave the picture, and is diffusers' get_crop_region.
    """
    box = []
    for axis in (1, 0):
        masked = np.flatnonzero(mask.any(axis=1 - axis))
        low = max(int(masked[0]) - padding, 0)
        box.append((low, min(int(masked[-1]) + 1 + padding, mask.shape[axis])))
    (left, right), (top, bottom) = box
    # Only the side that is too short grows: the crop never loses a masked pixel.
    if (right - left) / (bottom - top) > width / height:
        # int(), as in diffusers, so that crops are equal to the pixel.
        longer = int((right - left) / (width / height))
        top, bottom = _grown(top, bottom, longer, mask.shape[0])
    else:
        longer = int((bottom - top) * (width / height))
        left, right = _grown(left, right, longer, mask.shape[1])
    return left, top, right, bottom


def blurred(mask: UInt8[ndarray, "h w"], radius: float | int) -> UInt8[ndarray, "h w"]:
    """Pillow's Gaussian blur, which is diffusers' VaeImageProcessor.blur."""
    picture = Image.fromarray(mask).filter(ImageFilter.GaussianBlur(radius))
    return np.asarray(picture)


def dilated(mask: UInt8[ndarray, "h w"], by: int) -> UInt8[ndarray, "h w"]:
    """The largest value in the square of `by` pixels around each pixel."""
    for axis in (0, 1):
        pads = [(by, by) if i == axis else (0, 0) for i in (0, 1)]
        # The largest of a square is that of its rows' largest: two passes in place of
        # one over all of its pixels.
        wide = np.pad(mask, pads)
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * by + 1, axis)
        mask = windows.max(axis=-1)
    return mask


def to_bytes(x: Float[ndarray, "*shape"]) -> UInt8[ndarray, "*shape"]:
    """[0, 1] to 0…255, rounded."""
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def covering(masks: UInt8[ndarray, "n h w"], factor: int) -> ndarray:
    """1 over every latent that has a masked pixel.

    generate looks at the first pixel of a latent, so that up to factor - 1 masked
    pixels at a lower or right edge would keep what was there.
    """
    n, h, w = masks.shape
    down = [(0, 0), (0, -h % factor), (0, -w % factor)]
    # From 128 on a pixel is masked, as in diffusers' binarize.
    cells = np.pad(masks >= 128, down)
    cells = cells.reshape(n, cells.shape[1] // factor, factor, -1, factor)
    cells = cells.any(axis=(2, 4)).repeat(factor, 1).repeat(factor, 2)
    return cells[:, :h, :w, None].astype(np.float32)


def filled(pixels: UInt8[ndarray, "h w *c"], width: int, height: int):
    """Pixels resized to fit, the rest filled with their edges; and where they are."""
    h, w = pixels.shape[:2]
    wide = width / height < w / h
    # Whole-number division, as in diffusers' _resize_and_fill.
    fit = (width, h * width // w) if wide else (w * height // h, height)
    inner_width, inner_height = max(1, fit[0]), max(1, fit[1])
    # diffusers centres by these two halves, so that odd margins are where it has them.
    left = width // 2 - inner_width // 2
    top = height // 2 - inner_height // 2
    right, bottom = left + inner_width, top + inner_height
    pads = [(top, height - bottom), (left, width - right)]
    pads += [(0, 0)] * (pixels.ndim - 2)
    inner = resized(pixels, inner_width, inner_height)
    return np.pad(inner, pads, mode="edge"), (left, top, right, bottom)


def resized(pixels: ndarray, width: int, height: int) -> ndarray:
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS))


def _grown(low: int, high: int, length: int, most: int) -> tuple[int, int]:
    """The interval grown to `length` around its middle, moved into [0, most]."""
    more = length - (high - low)
    low, high = low - more // 2, high + more - more // 2
    # Pushed inside before it is cut: the crop keeps its aspect wherever it fits.
    if high >= most:
        low, high = low - (high - most), most
    if low < 0:
        low, high = 0, high - low
    return low, min(high, most)


def picture_rows(
    image: Any, mask: Any, border: Box | None
) -> tuple[Float[ndarray, "n H W 3"], UInt8[ndarray, "n H W"]]:
    """Pictures and masks in equal number, with the border."""
    pictures = np.asarray(input_images.pixels(image))
    masks = np.zeros((1, *pictures.shape[1:3]), np.uint8)
    if mask is not None:
        masks = to_bytes(input_images.mask(mask)[..., 0])
    if masks.shape[1:] != pictures.shape[1:3]:
        raise UserError(
            f"mask of {masks.shape[1:]} pixels: must equal the size of the picture,"
            f" {pictures.shape[1:3]}"
        )
    # One mask may serve all pictures, and one picture be repainted under several masks.
    counts = {len(pictures), len(masks)}
    if len(counts - {1}) > 1:
        raise UserError(
            f"{len(masks)} masks for {len(pictures)} images; expected the same number,"
            " or one"
        )
    if border is not None:
        left, top, right, bottom = border
        pads = [(0, 0), (top, bottom), (left, right)]
        # The colours of the edge: at a strength below 1 the model starts from them.
        pictures = np.pad(pictures, [*pads, (0, 0)], mode="edge")
        masks = np.pad(masks, pads, constant_values=255)
    n = max(counts)
    repeat = lambda x: np.broadcast_to(x, (n, *x.shape[1:]))
    return repeat(pictures), repeat(masks)


def softened(mask: ndarray, padding: int, radius: float | int) -> ndarray:
    mask = dilated(mask, padding) if padding else mask
    return blurred(mask, radius) if radius else mask


def acting(weight: ndarray, masks: ndarray, inner: ndarray, blurs: bool) -> ndarray:
    """The weight, 0 where no latent is repainted (`inner` 0) and the mask is below 0.5.

    There the model returns what it was given, through the autoencoder: its copy must
    not replace the original. A blur's edge stays, unless nothing is repainted.
    """
    white = (masks >= 128).any(axis=(1, 2))
    if not white.all():
        log.warning(
            "mask: no pixel is 0.5 (128) or more, after mask_blur, in %d of %d: these"
            " pictures are not repainted",
            (~white).sum(),
            len(white),
        )
    keeps = (inner == 0) & (masks < 128)[..., None] & (not blurs)
    keeps |= ~white[:, None, None, None]
    return np.where(keeps, np.float32(0), weight)
