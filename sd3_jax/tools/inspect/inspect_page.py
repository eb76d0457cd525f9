"""inspect.html: a contact sheet of records, with their pictures in the page."""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.data.records import Record
from sd3_jax.reports import html_page
from sd3_jax.sampling import latents

SIDE = 320  # pixels of a picture's longer side
FRAME = 40  # pixels of the longer side of the drawing of a crop
MOST = 2**20  # bytes of a picture; JPEGs of these sides have a twentieth of that


Box = tuple[float, float, float, float]  # left, top, width, height


class Contact(NamedTuple):
    """A record on the sheet; `name` is its shard and number."""

    name: str
    bucket: str
    bytes: int
    record: Record
    image: bytes  # JPEG


def html(
    where: str,
    figures: Sequence[tuple[str, str, str]],
    buckets: Sequence[tuple[str, str, float, str]],
    notes: Sequence[str],
    bad: Sequence[str],
    contacts: Sequence[Contact],
    *,
    rendering: str,
) -> str:
    """The page. `figures` are (label, value, unit), `buckets` (name, records, share, MB
    a record)."""
    counted = {name: f"{n} records, {x:.1%}" for name, n, x, _ in buckets}
    by_bucket = {}
    for contact in contacts:
        by_bucket.setdefault(contact.bucket, []).append(contact)
    sheets = [
        {
            "bucket": name,
            "counted": counted.get(name, ""),
            "rem": column_width(name),
            "figures": [(c, embedded(c), drawing(c.record)) for c in group],
        }
        for name, group in by_bucket.items()
    ]
    return html_page.render(
        "inspect.html",
        where=where,
        figures=figures,
        buckets=[
            (a, n, f"{x:.1%}", mb, html_page.Bar(0, x)) for a, n, x, mb in buckets
        ],
        notes=notes,
        bad=bad,
        sheets=sheets,
        rendering=rendering,
        origin=origin,
    )


def column_width(bucket: str) -> float:
    """The width of the columns of a bucket's sheet, in rem, from its aspect."""
    # By the root of the aspect: pictures of all buckets cover about the same area.
    height, width = map(int, bucket.split("x"))
    return min(22.0, max(10.0, 13 * math.sqrt(width / height)))


def embedded(contact: Contact) -> html_page.Picture:
    return html_page.picture(contact.image, contact.record.caption[:200], limit=MOST)


def origin(record: Record) -> str:
    if record.size is None:
        return "original size unknown"
    text = "{} × {} px".format(*record.size)
    if record.crop is None or record.crop == (0, 0, *record.size):
        return text
    top, left, height, width = record.crop
    return f"{text}, crop {height} × {width} at {top}, {left}"


def drawing(record: Record) -> tuple[Box, Box] | None:
    """The original's outline and the record's crop at FRAME pixels, if known."""
    if record.size is None:
        return None
    scale = FRAME / max(record.size)
    height, width = (max(1.0, scale * x) for x in record.size)
    top, left, h, w = (scale * x for x in record.crop or (0, 0, *record.size))
    return (0, 0, width, height), (left, top, w, h)


def picture(
    record: Record, decode: Callable[[ndarray], ndarray] | None = None
) -> UInt8[ndarray, "h w 3"]:
    """A record's picture: its pixels, its decoded latents, or a rough preview of them.

    `decode` maps scaled latents (h, w, c) to pixels (h, w, 3) in [0, 1].
    """
    tensors = record.tensors
    if "image" in tensors:
        return tensors["image"]
    x0 = np.asarray(tensors.get("latents", tensors.get("moments")), np.float32)
    if "latents" not in tensors:
        x0 = x0[..., : x0.shape[-1] // 2]  # the mean; the rest is log-variance
    pixels = preview(x0) if decode is None else np.asarray(decode(x0), np.float32)
    return np.rint(255 * np.clip(np.nan_to_num(pixels), 0, 1)).astype(np.uint8)


def preview(x0: Float[ndarray, "h w c"]) -> Float[ndarray, "h w 3"]:
    """A rough preview of latents in [0, 1], an eighth of the picture's sides."""
    if x0.shape[-1] == len(latents.TO_RGB):
        return np.asarray(latents.to_rgb(jnp.asarray(x0[None]))[0], np.float32)
    # Latents of other autoencoders: three channels as colours, at least their shapes.
    channels = x0[..., [min(i, x0.shape[-1] - 1) for i in range(3)]]
    low, high = np.percentile(channels, (1, 99), axis=(0, 1))
    return (channels - low) / np.maximum(high - low, 1e-6)


def jpeg(pixels: UInt8[ndarray, "h w 3"]) -> bytes:
    """A JPEG thumbnail, small enough for a page with dozens of them."""
    image = Image.fromarray(pixels)
    scale = SIDE / max(image.size)
    size = [max(1, round(scale * x)) for x in image.size]
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=85)
    return buffer.getvalue()
