"""HTML by small functions: plain text goes in and is escaped, Html comes out."""

import base64
import html
import io
import math
import re
from collections.abc import Iterable

from PIL import Image

from sd3_jax.data.images import open_header, pixels
from sd3_jax.reports.style import CSS

# Nothing may be fetched, run or sent, whatever a prompt says.
POLICY = (
    "default-src 'none'; img-src {}; style-src 'unsafe-inline'; base-uri 'none';"
    " form-action 'none'"
)
# What HTML and UTF-8 cannot hold, and marks that turn the text after them round.
UNFIT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufffe\uffff]"
)


class Html(str):
    """Text that is markup already."""


def escape(text: str) -> str:
    return html.escape(UNFIT.sub("\ufffd", text))


def document(title: str, *parts: str, images: str = "data:") -> str:
    """`images` is where pictures may come from; by default from the page itself."""
    # Prompts and metrics come from other people: besides escaping, a policy forbids
    # scripts and requests of any kind.
    policy = POLICY.format(images)
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{CSS}</style>",
    ]
    return "\n".join(
        ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>"]
        + ["<body>", "<main>", *filter(None, parts), "</main>", "</body>", "</html>\n"]
    )


def element(tag: str, *content: str, **attributes: str) -> Html:
    """element("p", "a < b", class_="note") escapes the text, not what is Html."""
    # class_ is class, and data_x is data-x: neither is a Python name.
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    markup = "".join(f' {names[k]}="{escape(v)}"' for k, v in attributes.items() if v)
    return Html(f"<{tag}{markup}>{''.join(map(_markup, content))}</{tag}>")


def join(parts: Iterable[str]) -> Html:
    return Html("\n".join(map(_markup, parts)))


def note(text: str) -> Html:
    return element("p", text, class_="note")


def section(title: str, *parts: str) -> Html:
    return element("section", element("h2", title), *filter(None, parts))


def details(summary: str, *parts: str, open: bool = False) -> Html:
    tag = "<details open>" if open else "<details>"
    inner = join([element("summary", summary), *parts])
    return Html(f"{tag}{inner}</details>")


# --- parts of a page


def stats(items: Iterable[tuple[str, str, str]]) -> Html:
    """(label, value, unit) each: the figures at the top of the page."""
    boxes = [
        element("div", element("dt", label), element("dd", value, _unit(unit)))
        for label, value, unit in items
    ]
    return element("dl", *boxes, class_="stats")


def table(head: dict[str, str], rows: Iterable[Iterable[str]]) -> Html:
    """`head` maps a column's title to its class: "number", "code", "bar" or ""."""
    kinds = list(head.values())
    align = ["number" if kind == "number" else "" for kind in kinds]
    top = [element("th", name, class_=kind) for name, kind in zip(head, align)]
    body = [
        element("tr", *(element("td", cell, class_=k) for cell, k in zip(row, kinds)))
        for row in rows
    ]
    inner = element("thead", element("tr", *top)) + element("tbody", join(body))
    return element("div", element("table", Html(inner)), class_="scroll")


def bar(score: float, low: float | None = None, high: float | None = None) -> Html:
    """Where a score in [0, 1] stands, and its interval; nothing for other scores."""
    low, high = (score if end is None else end for end in (low, high))
    if not 0 <= low <= score <= high <= 1:  # also what is NaN
        return Html("")
    span = f"left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"
    parts = element("i", style=span), element("b", style=f"left:{100 * score:.1f}%")
    return element("span", *parts, class_="track")


def filled(share: float) -> Html:
    """A bar of which so much, in [0, 1], is full."""
    part = element("i", style=f"left:0;width:{100 * share:.1f}%")
    return element("span", part, class_="track")


def panel(title: str, svg: str, caption: str) -> Html:
    """A plot under its title; without a plot the caption says why."""
    parts = element("h3", title), Html(svg), element("figcaption", caption)
    return element("figure", *parts)


def panels(figures: Iterable[str]) -> Html:
    return element("div", join(figures), class_="panels")


def image(data: bytes, alt: str, *, limit: int) -> Html:
    """The picture itself, inside the page: made smaller if above `limit` bytes."""
    # Decoded before it is embedded: a file that is no picture raises BadImage here.
    picture = open_header(data, alt)
    rgb, kind = pixels(picture, alt), picture.format.lower()
    if len(data) > limit:
        data, kind = _shrink(Image.fromarray(rgb), limit), "webp"
    height, width = rgb.shape[:2]
    # Inside the page, so that a report is a single file.
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    size = f'width="{width}" height="{height}"'
    return Html(f'<img src="{uri}" alt="{escape(alt)}" {size}>')


def film(frames: Iterable[tuple[str, str, str]]) -> Html:
    """(id, image or "", caption) each; a click on an image fills the window with it."""
    figures = []
    for name, picture, caption in frames:
        parts = [element("figcaption", caption)]
        if picture:
            close = element("a", "close", class_="close", href="#film")
            parts = [element("a", picture, href=f"#{name}"), *parts, close]
        # :target in the style sheet enlarges the figure whose id is in the URL: no
        # script.
        figures.append(element("figure", *parts, id=name))
    return element("div", join(figures), class_="film", id="film")


def prompts(texts: Iterable[str]) -> Html:
    return element("ol", join(element("li", t) for t in texts), class_="prompts")


# --- helpers


def _markup(text):
    return text if isinstance(text, Html) else escape(str(text))


def _unit(unit):
    return element("small", unit) if unit else Html("")


def _shrink(picture, limit):
    side = max(picture.size)
    while True:
        small = picture.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "webp", quality=88)
        if buffer.tell() <= limit or side <= 256:
            return buffer.getvalue()
        # Bytes go with the area, so sides go with the root of what is too much.
        side = int(side * max(0.5, min(0.9, math.sqrt(limit / buffer.tell()))))
