"""Perceptual fingerprints of pictures, which need no weights, and their comparison.

Comparing takes two steps. `prints` has descriptors for a loose search; `likeness` lays
the thumbnails of the pairs that it finds over each other. At as few false pairs
the libraries pdqhash and imagehash find fewer altered copies (benchmarks/dedup.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from numpy import ndarray
from PIL import Image
from scipy.ndimage import gaussian_filter

# Chosen on the tuning half of benchmarks/dedup.py, whose other half is reported.
LOOSE = 0.93  # cosine of descriptors: which pairs are laid over each other
THRESHOLD = 0.92  # likeness of a near-duplicate
SIDE = 48  # of a thumbnail's luminance, in pixels
COARSE = 16  # of its two chroma planes
TERMS = 6, 3  # cosine terms a side of the descriptor: of luminance, of chroma
FALL = 3  # terms: high ones turn round when a picture is cropped, and weigh less
CHROMA = 2  # weight of chroma in the descriptor
MEAN = 0.15  # weight of the mean luminance, and a constant beside it: without them,
FLOOR = 10  # flat pictures are all noise, and white is black
NOISE = 3  # levels: what JPEG at quality 30 leaves of a flat picture, and less counts
TINT = 0.5  # levels that a mean of chroma may be off by, in a picture compressed anew
TINGE = 4  # squared levels that its planes may differ by beside it
STILL = 300  # weight of no movement, in squared levels a pixel
SHIFT, STRETCH = 0.06, 0.12  # of the side, at most: crops of 5 % at either end
GAIN = 1.3  # of contrast and colour, or its inverse, at most
LIGHTER = 1.12  # of brightness, or its inverse, at most
WHITE = 248  # levels: from here on a channel may have been cut off at 255
BROAD = 2.5  # weight of what is left in means of 4 x 4 pixels: a crop's is at edges
STAIN = 1  # squared levels that compression leaves there
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # JPEG's, as its chroma
LEVELS = (4, 2, 1)  # the thumbnails' reductions, coarse first: 5 % are 0.6 pixels there
STEPS = 4  # of Gauss-Newton on each
BLOCK = 256  # pairs at once: 20 MB of derivatives


class Prints(NamedTuple):
    """Fingerprints of n pictures, 3 kB each."""

    descriptors: Float32[ndarray, "n d"]  # of length 1
    light: UInt8[ndarray, "n s s"]
    chroma: UInt8[ndarray, "n 2 c c"]


def prints(pictures: Sequence[UInt8[ndarray, "_ _ 3"]]) -> Prints:
    thumbnails = [_thumbnail(picture) for picture in pictures]
    light = np.array([x for x, _ in thumbnails], np.uint8).reshape(-1, SIDE, SIDE)
    chroma = np.array([x for _, x in thumbnails], np.uint8)
    chroma = chroma.reshape(-1, 2, COARSE, COARSE)
    return Prints(_descriptors(light, chroma), light, chroma)


def joined(parts: Sequence[Prints]) -> Prints:
    """The parts' pictures in one, in order."""
    return Prints(*map(np.concatenate, zip(*parts or [prints([])])))


def likeness(prints_: Prints, pairs: Int64[ndarray, "m 2"]) -> Float32[ndarray, " m"]:
    """The similarity of pairs once laid over each other, in [0, 1], 1 for equal.

    It is the share of one picture's variance, in luminance and chroma, that the other
    explains after it is shifted, stretched and fitted in contrast and brightness. The
    darker picture explains the brighter one, which may have been cut off at white.
    """
    alike = np.zeros(len(pairs), np.float32)
    for start in range(0, len(pairs), BLOCK):
        i, j = pairs[start : start + BLOCK].T
        one = prints_.light[i].astype(np.float32), _centred(prints_.chroma[i])
        other = prints_.light[j].astype(np.float32), _centred(prints_.chroma[j])
        alike[start : start + BLOCK] = _explained(*one, *other)
    return alike


def _thumbnail(picture):
    """Luminance (s, s) and two chroma planes (2, c, c), these about 128."""
    image = Image.fromarray(picture)
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
    rgb = np.asarray(small, np.float32)
    y = rgb @ LUMA
    chroma = np.stack([(rgb[..., 2] - y) / 1.772, (rgb[..., 0] - y) / 1.402])
    chroma = _reduced(chroma, SIDE // COARSE) + 128
    return y.round().astype(np.uint8), chroma.round().clip(0, 255).astype(np.uint8)


def _descriptors(light, chroma):
    """Low cosine terms of luminance and chroma, of which brightness moves few."""
    rows, coarse = _cosines(TERMS[0], SIDE), _cosines(TERMS[1], COARSE)
    y = rows @ light.astype(np.float32) @ rows.T  # (n, terms, terms)
    c = CHROMA * (coarse @ _centred(chroma) @ coarse.T)
    # Pictures that differ in brightness alone should stay near each other.
    y[:, 0, 0] *= MEAN
    y, c = y.reshape(-1, TERMS[0] ** 2), c.reshape(-1, 2 * TERMS[1] ** 2)
    terms = np.concatenate([np.full((len(y), 1), FLOOR, np.float32), y, c], axis=1)
    return terms / np.linalg.norm(terms, axis=1, keepdims=True)


def _cosines(terms, side):
    """The first rows of a DCT, falling off."""
    k, x = np.arange(terms)[:, None], (np.arange(side) + 0.5) / side
    scale = np.where(k, np.sqrt(2), 1) / side * np.exp(-0.5 * (k / FALL) ** 2)
    return (np.cos(np.pi * k * x) * scale).astype(np.float32)


def _centred(chroma):
    return chroma.astype(np.float32) - 128


def _reduced(x, by):
    *most, h, w = x.shape
    return x.reshape(*most, h // by, by, w // by, by).mean((-3, -1))


def _blurred(x):
    """Blur by a Gaussian of one pixel: less of JPEG's noise, smooth derivatives."""
    return gaussian_filter(x, 1.0, radius=3, mode="nearest", axes=(-2, -1))


def _explained(y1, c1, y2, c2):
    """The share of one's variance (and NOISE) that the other explains; (m,)."""
    # Coarse to fine: Gauss-Newton converges from a pixel or so away.
    move = np.zeros((len(y1), 4), np.float32)
    for by in LEVELS:
        a, b = _blurred(_reduced(y1, by)), _blurred(_reduced(y2, by))
        move = _moved(a, b, move)
    y, inside = _warped(a, move)
    planes = [_warped(c, move)[0] for c in np.moveaxis(c1, 1, 0)]
    coarse = _warped(c1[:, 0], move)[1]
    # From here on the first of a pair is the darker one.
    y, c1, b, c2 = _darker_first(y, np.stack(planes, 1), b, c2)
    y, c1 = _lighter(y, c1, b, c2)
    (mean1, var1), (mean2, var2), shared = _moments(y, b, inside)
    gain = (shared / np.maximum(var1, 1e-6)).clip(1 / GAIN, GAIN)
    residual = (var2 - 2 * gain * shared + gain**2 * var1).clip(0)
    variance = var2 + NOISE**2
    broad = BROAD * _broad(y, b, gain, inside)
    brighter = (mean2 / np.maximum(mean1, 1)).clip(1 / LIGHTER, LIGHTER)
    # A difference of means that no gain explains counts as well.
    residual += np.square(mean2 - brighter * mean1)
    for a, b in zip(np.moveaxis(c1, 1, 0), np.moveaxis(c2, 1, 0)):
        (mean1, var1), (mean2, var2), shared = _moments(a, b, coarse)
        chroma_residual = var2 - 2 * gain * shared + gain**2 * var1
        residual += (chroma_residual - TINGE).clip(0)
        residual += np.square((np.abs(mean2 - brighter * mean1) - TINT).clip(0))
        variance += var2
    return (1 - np.maximum(residual / variance, broad)).clip(0, 1)


def _darker_first(y1, c1, y2, c2):
    """Pair by pair: what was cut off at white cannot be made from the brighter one."""
    swap = y1.mean((1, 2)) > y2.mean((1, 2))
    ys = np.where(swap[:, None, None], (y2, y1), (y1, y2))
    cs = np.where(swap[:, None, None, None], (c2, c1), (c1, c2))
    return ys[0], cs[0], ys[1], cs[1]


def _lighter(y1, c1, y2, c2):
    """The first as light as the second, and cut off at white as that was.

    The gain is least squares where the second is not cut off; if it is everywhere,
    the most there may be.
    """
    one, other = _rgb(y1, c1), _rgb(y2, c2)  # (m, 3, s, s)
    clear = one * (other < WHITE)
    shared, energy = (np.einsum("mcij,mcij->m", clear, x) for x in (other, one))
    gain = np.where(energy > 0, shared / np.maximum(energy, 1), LIGHTER).clip(
        1, LIGHTER
    )
    return _ycc((one * gain[:, None, None, None]).clip(0, 255))


def _rgb(y, c):
    """(m, 3, s, s) of luminance (m, s, s) and chroma (m, 2, c, c) about 0."""
    blue, red = np.moveaxis(c.repeat(SIDE // COARSE, 2).repeat(SIDE // COARSE, 3), 1, 0)
    green = y - (0.114 * 1.772 * blue + 0.299 * 1.402 * red) / 0.587
    return np.stack([y + 1.402 * red, green, y + 1.772 * blue], 1)


def _ycc(rgb):
    y = np.einsum("mcij,c->mij", rgb, LUMA)
    chroma = np.stack([(rgb[:, 2] - y) / 1.772, (rgb[:, 0] - y) / 1.402], 1)
    return y, _reduced(chroma, SIDE // COARSE)


def _broad(y1, y2, gain, inside):
    """The share of the second's variance left in means of 4 x 4 pixels; (m,).

    Two digits differ by whole strokes, a picture from its crop at edges.
    """
    (mean1, _), (mean2, _), _ = _moments(y1, y2, inside)
    one = (y1 - mean1[:, None, None]) * gain[:, None, None] * inside
    other = (y2 - mean2[:, None, None]) * inside
    residual = np.square(_reduced(one - other, LEVELS[0])).mean((1, 2))
    variance = np.square(_reduced(other, LEVELS[0])).mean((1, 2)) + NOISE**2
    return (residual - STAIN).clip(0) / variance


def _moved(a, b, move):
    """Gauss-Newton from `move` on: (shift, stretch) down and across, in sides, so that
    a there is gain * b + offset. What is flat or plain stays where it is (STILL)."""
    n, limit = a.shape[-1], np.array([SHIFT, STRETCH] * 2, np.float32)
    place = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    down, across = (x * n for x in np.gradient(a, axis=(1, 2)))
    centred = b - b.mean((1, 2), keepdims=True)
    still = np.array([STILL] * 4 + [0, 0], np.float32) * n * n
    for _ in range(STEPS):
        y, inside = _warped(a, move)
        dy, dx = _warped(down, move)[0], _warped(across, move)[0]
        slopes = [dy, dy * place[:, None], dx, dx * place, -centred, -np.ones_like(b)]
        slopes = np.stack(slopes, 1) * inside[:, None]  # (m, 6, n, n)
        slopes = slopes.reshape(len(a), 6, n * n)
        normal = slopes @ slopes.swapaxes(1, 2)
        damping = 1e-3 * np.einsum("mii->mi", normal) + still + 1
        force = slopes @ -(y * inside).reshape(len(a), n * n, 1)
        force[:, :4, 0] -= still[:4] * move
        normal += np.eye(6, dtype=np.float32) * damping[:, None]
        step = np.linalg.solve(normal, force)[:, :4, 0]
        move = (move + step.clip(-0.05, 0.05)).clip(-limit, limit)
    return move


def _warped(x, move):
    """x (m, n, n) where `move` (m, 4) says, and where that lies in x."""
    n = x.shape[-1]
    place = (np.arange(n, dtype=np.float32) + 0.5) / n - 0.5
    inside = []
    for shift, stretch in (move[:, :2].T, move[:, 2:].T):  # rows, then columns
        at = (place * (1 + stretch[:, None]) + shift[:, None] + 0.5) * n - 0.5
        inside.append((at >= -0.5) & (at <= n - 0.5))
        at = at.clip(0, n - 1.001)
        low = at.astype(int)
        part, pair = (at - low)[..., None], np.arange(len(x))[:, None]
        x = x[pair, low] * (1 - part) + x[pair, low + 1] * part
        x = x.swapaxes(1, 2)
    return x, (inside[0][:, :, None] & inside[1][:, None, :]).astype(np.float32)


def _moments(a, b, inside):
    """(mean, variance) of each, and what they vary together, over what is inside."""
    count = inside.sum((1, 2))
    mean = lambda x: (x * inside).sum((1, 2)) / count
    mean1, mean2 = mean(a), mean(b)
    a, b = a - mean1[:, None, None], b - mean2[:, None, None]
    return (mean1, mean(a * a)), (mean2, mean(b * b)), mean(a * b)
