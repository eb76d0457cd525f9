"""Draws a plan: a bar for each slice, divided by where a step's time goes."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PARTS = {  # of a run, as they are called and coloured
    "linear": ("linear maps", "#2f5d8a"),
    "attention": ("attention", "#5b93c4"),
    "recomputed": ("run again", "#c98b3a"),
    "kernel": ("attention's extra product", "#dcb06e"),
    "padding": ("padding", "#b9b4ab"),
    "narrow": ("heads narrower than the matrix unit", "#d9d5cd"),
    "HBM of matmuls": ("matmuls wait for HBM", "#7a4f6b"),
    "elementwise": ("elementwise", "#a3637f"),
    "copy": ("copies, layouts", "#c98fa3"),
    "prefetch": ("waits for prefetches", "#e3bcc8"),
    "ICI": ("ICI not overlapped", "#3f7a5a"),
    "DCN": ("DCN not overlapped", "#86b396"),
    "host": ("host memory", "#4a4a4a"),
}


def parts(row: dict) -> dict[str, float]:
    """Milliseconds of a run by what they are for: products first, then all else."""
    products = {k: row["products"].get(k, 0.0) for k in list(PARTS)[:6]}
    # The analytic parts, stretched to what the compiled program's products take.
    stretch = row["compute"] / (sum(products.values()) or 1)
    others = {k: row["shares"].get(k, 0.0) for k in list(PARTS)[6:]}
    return {k: v * stretch for k, v in products.items()} | others


def draw(rows: Sequence[dict]) -> bytes:
    """PNG of the rows that fit; the model's own products first, then the losses."""
    # barh draws from the bottom up; reversed, the first row is on top.
    rows = [row for row in rows if "needs" not in row][::-1]
    figure = Figure(
        figsize=(8.5, 1.5 + 0.55 * len(rows)), dpi=150, layout="constrained"
    )
    # Agg without pyplot: no display and no global state.
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{row['slice']} {row['program']}".strip() for row in rows]
    left = [0.0] * len(rows)
    for key, (label, colour) in PARTS.items():
        sizes = [parts(row)[key] / row["scheduled"] for row in rows]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=label, height=0.6)
        left = [a + b for a, b in zip(left, sizes)]
    for name, row in zip(names, rows):
        text = f" {row['scheduled']:,.4g} ms, MFU {row['mfu_scheduled']:.2f}"
        axes.annotate(text, (1.0, name), va="center", fontsize=8)
    axes.set_xlabel("of the program's time as it is scheduled, at peak rates")
    axes.set_xlim(0, 1.35)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
