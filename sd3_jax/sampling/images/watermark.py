"""An invisible mark in a picture's luminance that reads without the original.

    python -m sd3_jax.sampling.images.watermark PICTURE...

Informed spread spectrum (Malvar and Florencio 2003) in 8 x 8 cosines (Cox et al. 1997)
of the picture scaled to a square grid, so that a mark survives compression, scaling and
a change of aspect, but neither crops, turns nor anyone who reads this file and wants it
gone. The library invisible-watermark would need PyTorch and OpenCV; this needs numpy.
"""

import functools
import hashlib
import sys
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

LENGTH = 16  # bytes of a message in UTF-8, at most
SIDE = 256  # pixels, at least: below, JPEG's noise is not averaged away
FINE = 512  # pixels from which on the finer grid carries the mark
GRIDS = {"coarse": 128, "fine": 256}  # cells a side
FRAME = 8 * (LENGTH + 4)  # bits: the message, with zeros behind it, and its CRC-32
BLOCK = 8
BAND = (3, 7)  # u + v of the cosines that carry it: above most of the picture itself
STRENGTH = {"coarse": 14.0, "fine": 20.0}  # of a bit's correlation, in levels
STILL = 1.0  # levels of activity below which a block takes no less of the mark
ROUNDS = 12
DOUBTFUL = 8  # bits, the weakest, that are tried both ways when the sum is wrong
LUMA = np.array([0.299, 0.587, 0.114])  # JPEG's


def fits(message: str) -> bool:
    """Whether it is 1 to LENGTH bytes of text that prints."""
    return message.isprintable() and 1 <= len(message.encode()) <= LENGTH


def embed(image: UInt8[ndarray, "h w 3"], message: str) -> UInt8[ndarray, "h w 3"]:
    """The picture with the message in it; ValueError if it is smaller than 256 pixels.

    All channels change alike, so that colours stay. The change grows until every bit
    reads with the requested strength, what rounding and clipping took of it included.
    """
    h, w = image.shape[:2]
    if not fits(message):
        raise ValueError(
            f"{message!r}: expected 1 to {LENGTH} bytes of text that prints"
        )
    if min(h, w) < SIDE:
        raise ValueError(f"{w} x {h} pixels; a watermark needs sides of {SIDE} or more")
    name = "fine" if min(h, w) >= FINE else "coarse"
    grid, wanted = GRIDS[name], STRENGTH[name]
    signs = 2.0 * _frame(message) - 1  # (FRAME,)
    rows, columns = _spread(grid, h), _spread(grid, w)
    bits, chips = _chips(grid)
    # From the unmarked picture: the mark itself is no activity to hide in.
    weights = _tolerance(_cells(image, grid))
    carried = np.bincount(bits, chips**2 * weights, FRAME)
    total = np.zeros(FRAME)  # of the mark, in correlation
    marked = image
    # Rounding to bytes and clipping at 0 and 255 take some of the mark away, so the
    # correlation is measured on the written bytes and what lacks is added.
    for _ in range(ROUNDS):
        lack = np.maximum(wanted - signs * _correlation(_cells(marked, grid)), 0)
        if lack.max() < 0.05 * wanted:
            break
        total += signs * lack
        terms = (total / carried)[bits] * chips * weights
        # (g, g) cells → (h, w) pixels
        change = rows @ _pixels(terms, grid) @ columns.T
        marked = np.rint(np.clip(image + change[..., None], 0, 255)).astype(np.uint8)
    return marked


def read(image: UInt8[ndarray, "h w 3"]) -> str | None:
    """The message of a marked picture; None if none is there whose sum is right."""
    for grid in GRIDS.values():
        soft = _correlation(_cells(image, grid))
        weakest = np.argsort(np.abs(soft))[:DOUBTFUL]
        # Bits near 0 are the likely errors. 256 tries against a CRC of 32 bits: a false
        # message has a chance of 2^-24 for each grid.
        for flips in np.ndindex((2,) * DOUBTFUL):
            bits = soft > 0
            bits[weakest] ^= np.array(flips, bool)
            message = _message(bits)
            if message is not None:
                return message
    return None


def errors(image: UInt8[ndarray, "h w 3"], message: str) -> float:
    """The share of the frame's bits that read wrongly, on the better of the grids."""
    frame = _frame(message)
    read = [_correlation(_cells(image, grid)) > 0 for grid in GRIDS.values()]
    return min(float(np.mean(bits != frame)) for bits in read)


# --- message and bits


def _frame(message: str) -> ndarray:
    """(FRAME,) of bool."""
    text = message.encode().ljust(LENGTH, b"\0")
    # 16 bytes of text and 4 of its checksum: 160 bits
    whole = text + zlib.crc32(text).to_bytes(4, "big")
    return np.unpackbits(np.frombuffer(whole, np.uint8)).astype(bool)


def _message(bits: ndarray) -> str | None:
    frame = np.packbits(bits).tobytes()
    text, crc = frame[:LENGTH], frame[LENGTH:]
    if zlib.crc32(text).to_bytes(4, "big") != crc:
        return None
    try:
        message = text.rstrip(b"\0").decode()
    except UnicodeDecodeError:
        return None
    return message if fits(message) else None


def _correlation(cells: Float[ndarray, "g g"]) -> Float[ndarray, " bits"]:
    """Of each bit's cosines with its chips."""
    bits, chips = _chips(len(cells))
    return np.bincount(bits, _terms(cells) * chips, FRAME)


# --- pixels, cells and cosines


def _cells(image: UInt8[ndarray, "h w 3"], grid: int) -> Float[ndarray, "g g"]:
    """Mean luminance of each cell of the grid that lies over the whole picture."""
    # (h, w, 3) → (h, w); JPEG keeps luminance better than colour.
    light = image.astype(np.float64) @ LUMA
    h, w = light.shape
    return _means(grid, h) @ light @ _means(grid, w).T


@functools.lru_cache(16)
def _means(grid: int, n: int) -> Float[ndarray, "g n"]:
    """Each cell's mean over n pixels, parts of pixels counted as such."""
    edges = np.arange(grid + 1) * n / grid
    pixel = np.arange(n)
    high = np.minimum(edges[1:, None], pixel + 1)
    low = np.maximum(edges[:-1, None], pixel)
    return np.maximum(high - low, 0) * grid / n


@functools.lru_cache(16)
def _spread(grid: int, n: int) -> Float[ndarray, "n g"]:
    """Pixels from cells, linearly between their centres."""
    place = np.clip((np.arange(n) + 0.5) * grid / n - 0.5, 0, grid - 1)
    return np.maximum(1 - np.abs(place[:, None] - np.arange(grid)), 0)


@functools.cache
def _cosines() -> Float[ndarray, "8 8"]:
    """The orthonormal DCT-II, a frequency a row."""
    k, x = np.arange(BLOCK)[:, None], np.arange(BLOCK)
    table = np.cos(np.pi * k * (2 * x + 1) / (2 * BLOCK)) * np.sqrt(2 / BLOCK)
    table[0] /= np.sqrt(2)
    return table


@functools.cache
def _band() -> tuple[ndarray, ndarray]:
    u, v = np.indices((BLOCK, BLOCK))
    return np.nonzero((u + v >= BAND[0]) & (u + v <= BAND[1]))


def _terms(cells: Float[ndarray, "g g"]) -> Float[ndarray, " terms"]:
    """The band's cosines of all blocks, block by block."""
    n, c = len(cells) // BLOCK, _cosines()
    # (g, g) → (n, n, 8, 8)
    blocks = cells.reshape(n, BLOCK, n, BLOCK).transpose(0, 2, 1, 3)
    return (c @ blocks @ c.T)[(..., *_band())].ravel()


def _pixels(terms: Float[ndarray, " terms"], grid: int) -> Float[ndarray, "g g"]:
    """The inverse of _terms, all other cosines being 0."""
    n, c = grid // BLOCK, _cosines()
    blocks = np.zeros((n, n, BLOCK, BLOCK))
    blocks[(..., *_band())] = terms.reshape(n, n, -1)
    return (c.T @ blocks @ c).transpose(0, 2, 1, 3).reshape(grid, grid)


@functools.cache
def _chips(grid: int) -> tuple[ndarray, ndarray]:
    """The bit that each term belongs to, all as often, and its chip.

    Of norm 1 for each bit, growing with the frequency as pictures fall; from a hash,
    for numpy's generators may draw otherwise in another version.
    """
    count = (grid // BLOCK) ** 2 * len(_band()[0])
    seed = f"sd3_jax watermark 1, {grid}".encode()
    words = np.frombuffer(hashlib.shake_256(seed).digest(8 * count), "<u4")
    order, signs = words[:count], words[count:]
    bits = np.empty(count, np.int64)
    bits[np.argsort(order, kind="stable")] = np.arange(count) % FRAME
    heights = np.tile(np.add(*_band()), (grid // BLOCK) ** 2)
    chips = heights * ((signs & 1) * 2.0 - 1)
    return bits, chips / np.sqrt(np.bincount(bits, chips**2))[bits]


def _tolerance(cells: Float[ndarray, "g g"]) -> Float[ndarray, " terms"]:
    """How much of the mark each term takes: more where all of a block hides it."""
    n, half, terms = len(cells) // BLOCK, BLOCK // 2, len(_band()[0])
    # (g, g) → (n, 2, n, 2): the spread within each quarter of a block
    quarters = cells.reshape(n, 2, half, n, 2, half).std((2, 5))
    # The least active quarter decides: a mark shows in the flat half of an edge block.
    activity = quarters.min((1, 3)).ravel()
    weight = np.sqrt(np.clip(activity, STILL, 16 * STILL))
    return np.repeat(weight / weight.mean(), terms)


def main(paths: Sequence[str]) -> int:
    """A line for each picture: its message, or "no mark". 1 if one has none."""
    from sd3_jax.data import images  # the job's reader of foreign files

    if not paths:
        print(
            "usage: python -m sd3_jax.sampling.images.watermark PICTURE...",
            file=sys.stderr,
        )
        return 2
    code = 0
    for path in paths:
        try:
            message = read(images.read(path))
        except images.BadImage as error:
            print(f"sd3-jax: error: {error}", file=sys.stderr)
            return 2
        code = code if message else 1
        print(f"{path}: {message or 'no mark'}")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
