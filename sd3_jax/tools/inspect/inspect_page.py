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
from sd3_jax.foreign_text import shown
from sd3_jax.reports import html_page
from sd3_jax.sampling import latents

SIDE = 320  # pixels of a picture's longer side
FRAME = 40  # pixels of the longer side of the drawing of a crop
MOST = 2**20  # bytes of a picture; JPEGs of these sides have a twentieth of that
STYLE = """
main { max-width: 1400px }
.scroll { margin-bottom: 1.2rem }
section .note { margin-bottom: .6rem }
.sheet { display: grid; gap: 1.6rem 1.2rem; align-items: start }
.sheet img { width: 100%; border-radius: 4px; background: var(--wash) }
.sheet figcaption { margin-top: .5rem; font-size: .82rem; line-height: 1.4;
  overflow-wrap: anywhere }
.sheet p { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 5;
  overflow: hidden; margin: 0 0 .35rem; color: var(--ink) }
.sheet p.none { color: var(--faint); font-style: italic }
.facts { display: flex; flex-wrap: wrap; gap: .3rem .6rem; font-size: .76rem }
.facts svg { flex: none; width: auto; height: auto; margin: .2rem 0 0 }
.facts div { flex: 1 1 8rem }
.made { padding: 0 .4em; border-radius: 3px; background: var(--wash);
  color: var(--accent) }
"""


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
    head = {"Bucket": "code", "Records": "number", "Share": "number"}
    head |= {"MB a record": "number", "": "bar"}
    rows = [(a, n, f"{x:.1%}", mb, html_page.filled(x)) for a, n, x, mb in buckets]
    by_bucket = {}
    for contact in contacts:
        by_bucket.setdefault(contact.bucket, []).append(contact)
    counted = {name: f"{n} records, {x:.1%}" for name, n, x, _ in buckets}
    return html_page.document(
        "Records",
        html_page.Html(f"<style>{STYLE}</style>"),
        html_page.element("p", "Inspection", class_="eyebrow"),
        html_page.element("h1", "Records"),
        html_page.element("p", where, class_="lede"),
        html_page.stats(figures),
        html_page.section(
            "Buckets", html_page.table(head, rows), *map(html_page.note, notes)
        ),
        faults(bad),
        html_page.note(f"The pictures below are {rendering}.") if contacts else "",
        *(
            html_page.section(
                name, html_page.note(counted.get(name, "")), sheet(contacts_)
            )
            for name, contacts_ in by_bucket.items()
        ),
    )


def faults(bad: Sequence[str]) -> str:
    if not bad:
        return ""
    rows = html_page.join(
        html_page.element("li", html_page.element("code", line)) for line in bad
    )
    return html_page.section("Bad", html_page.element("ul", rows))


def sheet(contacts: Sequence[Contact]) -> html_page.Html:
    """Pictures of one bucket, in columns whose width follows from its aspect."""
    # By the root of the aspect: pictures of all buckets cover about the same area.
    height, width = map(int, contacts[0].bucket.split("x"))
    rem = min(22.0, max(10.0, 13 * math.sqrt(width / height)))
    style = (
        f"grid-template-columns:repeat(auto-fill,minmax(min({rem:.1f}rem,100%),1fr))"
    )
    return html_page.element(
        "div", html_page.join(map(figure, contacts)), class_="sheet", style=style
    )


def figure(contact: Contact) -> html_page.Html:
    record = contact.record
    # The sheet shows five lines of a caption; the title has all of it.
    text = html_page.element("p", record.caption, title=record.caption)
    if not record.caption:
        text = html_page.element("p", "no caption", class_="none")
    line = html_page.Html("<br>")
    facts = [contact.name, line, shown(record.source, 200), line]
    facts += [origin(record), line, f"{contact.bytes / 1e6:.3f} MB"]
    if record.caption_from:
        facts += [" ", html_page.element("span", record.caption_from, class_="made")]
    facts = html_page.element("div", *facts, class_="soft")
    facts = html_page.element("div", drawing(record), facts, class_="facts")
    picture = html_page.image(contact.image, record.caption[:200], limit=MOST)
    return html_page.element(
        "figure", picture, html_page.element("figcaption", text, facts)
    )


def origin(record: Record) -> str:
    if record.size is None:
        return "original size not told"
    text = "{} × {} px".format(*record.size)
    if record.crop is None or record.crop == (0, 0, *record.size):
        return text
    top, left, height, width = record.crop
    return f"{text}, crop {height} × {width} at {top}, {left}"


def drawing(record: Record) -> html_page.Html:
    """A drawing of the original's outline and the record's crop, if both are known."""
    if record.size is None:
        return html_page.Html("")
    scale = FRAME / max(record.size)
    height, width = (max(1.0, scale * x) for x in record.size)
    top, left, h, w = (scale * x for x in record.crop or (0, 0, *record.size))
    rect = '<rect {} x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>'
    kept = rect.format('fill="#a9c0f6" stroke="#2a5bd7"', left, top, w, h)
    whole = rect.format('fill="none" stroke="#8d95a1"', 0, 0, width, height)
    return html_page.Html(  # figures' svg is as wide as they are, but for this style
        f'<svg width="{width + 2:.0f}" height="{height + 2:.0f}"'
        f' viewBox="-1 -1 {width + 2:.1f} {height + 2:.1f}">{whole}{kept}</svg>'
    )


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
