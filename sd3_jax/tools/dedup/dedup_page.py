"""duplicates.html: the pairs that dedup found, with their pictures in the page."""

import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.foreign_text import shown
from sd3_jax.reports import html_page, plots

SIDE = 200  # pixels of a picture's longer side
BINS = 24
MOST = 2**18  # bytes of a picture; a larger one is made smaller


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
    pairs: Iterable[tuple[Shot | None, Shot | None, float]],
) -> str:
    """The page; None in `pairs` is a picture that changed since it was compared."""
    bins = histogram(alike, threshold)
    return html_page.render(
        "duplicates.html",
        report=report,
        share=f"{report['removed'] / max(1, report['pictures']):.2%}",
        compared=len(alike),
        threshold=threshold,
        histogram=panel(bins, threshold),
        bins=[
            (
                f"{start:.3f} – {end:.3f}",
                f"{count:,}",
                "near-duplicates" if start >= threshold - 1e-9 else "distinct",
            )
            for start, end, count in bins
        ],
        pairs=[
            ([(x, _picture(x)) for x in (one, other) if x is not None], similarity)
            for one, other, similarity in pairs
        ],
        settings={
            "config.dedup": _rows(report["settings"]),
            "seconds": _rows(report["seconds"]),
        },
    )


def panel(bins: list[tuple[float, float, int]], threshold: float) -> html_page.Panel:
    if not bins:
        return html_page.Panel("", "", "")
    starts, ends, counts = zip(*bins)
    svg = plots.histogram([*starts, ends[-1]], counts, "similarity", mark=threshold)
    # Nearly all pairs are far from alike: on a linear axis only their bin is visible.
    caption = f"The vertical axis is logarithmic; the line is at {threshold:g}."
    return html_page.Panel("Pairs by similarity", svg, caption)


def histogram(
    alike: Float[ndarray, " m"], threshold: float
) -> list[tuple[float, float, int]]:
    """(start, end, pairs) of similarities, in bins with the threshold as an edge."""
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
    return list(zip(edges.tolist(), edges[1:].tolist(), counts.tolist()))


def _picture(shot: Shot) -> html_page.Picture:
    return html_page.picture(shot.jpeg, shown(shot.source, 200), limit=MOST)


def _rows(values: dict) -> list[tuple[str, str, None]]:
    """As the macro `settings` takes them, without defaults."""
    return [(key, _as_text(value), None) for key, value in values.items()]


def _as_text(value) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
