"""The plan as bars: what a step's time is for, a slice a bar."""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SHARES = {  # of Compute's fields, as they are called and coloured
    "linear": ("linear maps", "#2f5d8a"),
    "attention": ("attention", "#5b93c4"),
    "recomputed": ("run again", "#c98b3a"),
    "kernel": ("attention's extra product", "#dcb06e"),
    "padding": ("padding", "#b9b4ab"),
    "narrow": ("heads narrower than the matrix unit", "#d9d5cd"),
}
MARKS = {"memory": ("HBM", "#8a2f4a", "D"), "links": ("links", "#fafafa", "o")}


def draw(rows: Sequence[dict]) -> bytes:
    """PNG of the rows that fit; the model's own products first, then the losses."""
    rows = [row for row in rows if "needs" not in row][::-1]
    figure = Figure(figsize=(8.5, 1.3 + 0.55 * len(rows)), dpi=150, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [f"{row['slice']} {row['program']}".strip() for row in rows]
    left = [0.0] * len(rows)
    for key, (label, colour) in SHARES.items():
        sizes = [row["shares"].get(key, 0.0) / row["compute"] for row in rows]
        axes.barh(names, sizes, left=left, color=colour, label=label, height=0.6)
        left = [a + b for a, b in zip(left, sizes)]
    for key, (label, colour, mark) in MARKS.items():
        at = [row[key] / row["compute"] for row in rows]
        axes.scatter(
            at,
            names,
            color=colour,
            edgecolor="black",
            marker=mark,
            s=40,
            label=label,
            zorder=3,
        )
    for name, row in zip(names, rows):
        axes.annotate(
            f" {max(row['compute'], row['memory'], row['links']):,.0f} ms,"
            f" MFU {row['mfu']:.2f}",
            (
                max(1.0, row["memory"] / row["compute"], row["links"] / row["compute"]),
                name,
            ),
            va="center",
            fontsize=8,
        )
    axes.set_xlabel("of the compute floor")
    axes.set_xlim(0, 1.35 * max([1.0, *(axes.get_xlim()[1:])]) if rows else 1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=7, frameon=False)
    figure.set_layout_engine("constrained")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
