"""duplicates.html: the pairs that dedup found, with their pictures in the page."""

import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.foreign_text import shown
from sd3_jax.reports import html_page

SIDE = 200  # pixels of a picture's longer side
BINS = 24
MOST = 2**18  # bytes of a picture; a larger one is made smaller
STYLE = """
.pairs { display: grid; gap: 1.6rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)) }
.pairs figure > div { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem }
.pairs img { width: 100%; height: auto; border-radius: 4px; background: var(--wash) }
.pairs figcaption { margin-top: .4rem; font-size: .8rem; overflow-wrap: anywhere }
"""


class Shot(NamedTuple):
    source: str
    size: tuple[int, int]  # (height, width) of the original
    jpeg: bytes


def shot(source: str, picture: UInt8[ndarray, "h w 3"]) -> Shot:
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=80)
    return Shot(source, picture.shape[:2], buffer.getvalue())


def spread(alike: Float[ndarray, " m"], threshold: float, count: int) -> ndarray:
    """Choose `count` pairs for the page; returns indices, most alike first.

    Half of them are nearest to the threshold, which is where a wrong one shows; the
    others are spread over the whole range.
    """
    # Stable, so that the page does not depend on the machine's sort.
    order = np.argsort(-alike, kind="stable")
    if len(order) <= count:
        return order
    nearest = np.argsort(np.abs(alike - threshold), kind="stable")[: count // 2]
    others = order[~np.isin(order, nearest)]
    levels = np.linspace(alike[others[0]], alike[others[-1]], count - len(nearest))
    at = np.searchsorted(-alike[others], -levels).clip(0, len(others) - 1)
    chosen = np.union1d(nearest, others[at])
    return order[np.isin(order, chosen)]


def html(
    report: dict[str, Any],
    alike: Float[ndarray, " m"],
    threshold: float,
    pairs: Iterable[tuple[Shot, Shot, float]],
) -> str:
    n, removed = report["pictures"], report["removed"]
    share = f"{removed / max(1, n):.2%}"
    unread = sum(report["unreadable"].values())
    figures = [("pictures", f"{n:,}", ""), ("near-duplicates", f"{removed:,}", share)]
    figures.append(("pairs", f"{report['pairs']:,}", ""))
    figures.append(("unreadable", f"{unread:,}", ""))
    settings = report["settings"] | {
        f"seconds to {stage}": value for stage, value in report["seconds"].items()
    }
    rows = [(key, _as_text(value)) for key, value in settings.items()]
    reasons = [(reason, f"{count:,}") for reason, count in report["unreadable"].items()]
    columns = {"Similarity": "number", "Pairs": "number", "": "bar", " ": ""}
    explanation = html_page.note(
        f"Pairs of {threshold:g} or above are near-duplicates. A picture goes if it is"
        " one of a picture that is kept; of more pixels first, then of more bytes."
    )
    return html_page.document(
        "Near-duplicates",
        html_page.Html(f"<style>{STYLE}</style>"),
        html_page.element("p", "Near-duplicates", class_="eyebrow"),
        html_page.element("h1", f"{removed:,} of {n:,} pictures"),
        html_page.stats(figures),
        html_page.section(
            "Similarity",
            explanation,
            html_page.table(columns, histogram(alike, threshold)),
        ),
        html_page.section("Pairs", sheet(pairs, threshold)),
        html_page.section(
            "Settings", html_page.table({"Key": "code", "Value": ""}, rows)
        ),
        html_page.section(
            "Unreadable", html_page.table({"Reason": "", "Files": "number"}, reasons)
        )
        if reasons
        else "",
    )


def histogram(alike: Float[ndarray, " m"], threshold: float) -> list[tuple]:
    """Rows of the table of similarities, in bins with the threshold as an edge."""
    if not len(alike):
        return []
    low, high = min(float(alike.min()), threshold), max(1.0, float(alike.max()))
    below = round(BINS * (threshold - low) / max(high - low, 1e-6))
    edges = [np.linspace(low, threshold, below + 1)[:-1]]
    edges = np.concatenate([*edges, np.linspace(threshold, high, BINS - below + 1)])
    edges = np.unique(np.append(edges, threshold))
    # Not np.histogram: a float32 similarity of just the threshold may fall below its
    # float64 edge. The slack puts it above.
    place = np.searchsorted(edges, alike.astype(np.float64) + 1e-9, side="right") - 1
    counts = np.bincount(place.clip(0, len(edges) - 2), minlength=len(edges) - 1)
    rows = []
    for start, end, count in zip(edges, edges[1:], counts.tolist()):
        track = html_page.filled(count / counts.max())
        verdict = "near-duplicates" if start >= threshold - 1e-9 else "distinct"
        rows.append((f"{start:.3f} – {end:.3f}", f"{count:,}", track, verdict))
    return rows


def sheet(
    pairs: Iterable[tuple[Shot, Shot, float]], threshold: float
) -> html_page.Html:
    figures = [_figure(*pair, threshold) for pair in pairs]
    if not figures:
        return html_page.note("There are none.")
    return html_page.element("div", html_page.join(figures), class_="pairs")


def _figure(
    one: Shot | None, other: Shot | None, similarity, threshold
) -> html_page.Html:
    # None is a picture that was removed or changed since it was compared.
    shots = [shot_ for shot_ in (one, other) if shot_ is not None]
    images = [html_page.image(x.jpeg, shown(x.source, 200), limit=MOST) for x in shots]
    verdict = "near-duplicates" if similarity >= threshold else "distinct"
    lines = [html_page.element("b", f"{similarity:.3f}"), f" · {verdict}"]
    for x in shots:
        size = "{} × {}".format(*x.size)
        lines += [html_page.Html("<br>"), f"{shown(x.source, 200)} · {size}"]
    pictures = html_page.element("div", *images)
    return html_page.element(
        "figure", pictures, html_page.element("figcaption", *lines)
    )


def _as_text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value)
