"""Curves as inline SVG. Colours are the page's CSS variables, so dark mode works."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from sd3_jax.reports import smoothing
from sd3_jax.reports.inline_svg import ACCENT, RULE, SOFT, inline
from sd3_jax.reports.smoothing import drawable, positive

STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.parse_math": False,  # "$" in a user's name is no formula
    "text.color": SOFT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "legend.frameon": False,
    "legend.labelcolor": SOFT,
}
FEW_TICKS = 6  # on a logarithmic axis, each with its number


def over_steps(
    steps: list[int],
    values: list[float],
    *,
    window: int,
    frame: tuple[float, float],
) -> str:
    """A curve over training steps, and if `window` > 1 a smooth one over it."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        _curve(axes, np.asarray(steps), drawable(values), window)
        axes.set_ylim(*frame)
        axes.set_xlabel("step")
        # Around a single step the locator would mark fractions of it.
        if min(steps) == max(steps):
            axes.set_xticks([steps[0]])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands(max(steps))))
        return inline(figure)


def by_t(curves: dict[int, tuple[list[float], list[float]]]) -> str:
    """Loss over t, a curve for each step of `curves`: the last in colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        *early, last = sorted(curves)
        for i, step in enumerate(early):
            shade = 0.25 + 0.5 * (i + 1) / len(early)
            look = dict(color=SOFT, alpha=shade, lw=1.2, label=f"step {step:,}")
            axes.plot(*map(drawable, curves[step]), **look)
        look = dict(color=ACCENT, lw=1.8, marker="o", ms=3, label=f"step {last:,}")
        axes.plot(*map(drawable, curves[last]), **look)
        axes.set_xlim(0, 1)
        axes.set_xlabel("t (0 is data, 1 is noise)")
        axes.legend(fontsize=9, handlelength=1.2)
        return inline(figure)


def by_layer(curves: dict[str, list[float]]) -> str:
    """Errors of each part's layers, first to last, on a logarithmic scale."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        for i, (name, values) in enumerate(curves.items()):
            place = np.linspace(0, 1, len(values)) if len(values) > 1 else [0.5]
            shade = 0.35 + 0.5 * i / max(1, len(curves) - 1)
            look = dict(color=SOFT, alpha=shade) if i else dict(color=ACCENT, lw=1.8)
            mark = "oovs^D*"[i % 7]
            axes.plot(place, positive(values), marker=mark, ms=3, label=name, **look)
        _logarithmic(axes)
        axes.set_xticks([0, 1], ["first layer", "last"])
        _legend_below(figure, curves)
        return inline(figure)


def over_steps_log(curves: dict[str, list[float]]) -> str:
    """Errors after each step, on a logarithmic scale; the first curve in colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        for i, (name, values) in enumerate(curves.items()):
            steps = np.arange(1, len(values) + 1)
            look = dict(color=ACCENT, lw=1.8) if i == 0 else dict(color=SOFT, lw=1.2)
            line = "-" if i < 2 else "--"
            axes.plot(
                steps,
                positive(values),
                line,
                marker="o",
                ms=3,
                label=name,
                **look,
            )
        _logarithmic(axes)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("step")
        _legend_below(figure, curves)
        return inline(figure)


def curves(
    lines: dict[str, tuple],
    x: str,
    y: str,
    *,
    log: str = "",
    joined: bool = True,
    first: str | None = None,
    unmarked: str | None = None,
) -> str:
    """Named curves, or points if not `joined`, one shade and mark each; `first` is in
    colour, and `unmarked` has no marks. `log` names the logarithmic axes: "xy"."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        others = [name for name in lines if name != first]
        for name, (xs, ys) in lines.items():
            i = others.index(name) if name in others else 0
            shade = 0.95 - 0.45 * i / max(1, len(others) - 1)
            mine = dict(color=ACCENT, lw=1.8, zorder=3)
            theirs = dict(color=SOFT, alpha=shade, lw=1.2)
            look = mine if name == first else theirs
            line = ("-", "--", ":", "-.")[i % 4] if joined else "none"
            mark = "" if name == unmarked else "ov^sD*Pp"[i % 8]
            look |= dict(linestyle=line, marker=mark, ms=4.5)
            axes.plot(drawable(xs), drawable(ys), label=name, **look)
        for axis in log:
            drawn = [drawable(line["xy".index(axis)]) for line in lines.values()]
            # matplotlib refuses a logarithmic axis without a positive value.
            if not any((values > 0).any() for values in drawn):
                continue
            getattr(axes, f"set_{axis}scale")("log")
            ticked = getattr(axes, f"{axis}axis")
            ticked.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticked.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            # matplotlib labels minor ticks of a short logarithmic axis too, and they
            # overlap.
            ticked.set_minor_locator(NullLocator())
        every = sorted({x for xs, _ in lines.values() for x in xs})
        if "x" in log and len(every) <= FEW_TICKS:
            axes.set_xticks(every, [f"{x:g}" for x in every])
        elif "x" not in log and all(isinstance(value, int) for value in every):
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(lines) > 1:
            _legend_below(figure, lines)
        return inline(figure)


def bars(values: dict[str, tuple[float, float, float]], x: str, *, mark: float) -> str:
    """Named ratios from top to bottom, each (value, least, most), as bars from `mark`
    on a logarithmic axis; those that reach the `mark` are in colour."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = _panel(height=0.85 + 0.26 * len(values))
        names, rows = list(values), np.array(list(values.values()), float)
        middle, low, high = rows.T
        colour = [ACCENT if value >= mark else SOFT for value in middle]
        place = np.arange(len(names))
        axes.set_xscale("log")
        axes.barh(place, middle - mark, 0.62, left=mark, color=colour, alpha=0.75)
        axes.hlines(place, low, high, color=SOFT, lw=1.2)
        # In a column beside the axes, where no line crosses them.
        for y, value in zip(place, middle):
            right = dict(transform=axes.get_yaxis_transform(), va="center")
            axes.text(1.02, y, f"{value:.2f}", color=SOFT, fontsize=9.5, **right)
        axes.axvline(mark, color=SOFT, lw=0.9, ls="--")
        axes.set_yticks(place, names)
        axes.invert_yaxis()
        axes.set_xlim(min(low.min(), mark) / 1.15, 1.15 * max(high.max(), mark))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(x)
        return inline(figure)


def histogram(
    edges: Sequence[float], counts: Sequence[int], x: str, *, mark: float
) -> str:
    """Counts between edges on a logarithmic axis; bins from `mark` on are in colour."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel()
        colour = [ACCENT if edge >= mark - 1e-9 else SOFT for edge in edges[:-1]]
        widths = 0.92 * np.diff(edges)
        axes.bar(edges[:-1], counts, widths, align="edge", color=colour, alpha=0.75)
        axes.set_yscale("log")
        axes.set_ylim(0.3, 2 * max(counts))  # below 1: a bin of one pair has a height
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        whole = lambda count, _: f"{count:,.0f}" if count >= 1 else ""
        axes.yaxis.set_major_formatter(FuncFormatter(whole))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.axvline(mark, color=SOFT, lw=0.9, ls="--")
        axes.set_xlabel(x)
        return inline(figure)


def _legend_below(figure, names):
    """A legend under the axes, for which the figure grows."""
    # Beside the axes, long names would take a third of the width.
    columns = 2 if max(map(len, names)) <= 26 else 1
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(names) // columns))
    style = dict(ncols=columns, fontsize=9, handlelength=2.2)
    figure.legend(loc="outside lower center", **style)


def _logarithmic(axes):
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}"))


# --- figures


def _panel(height: float = 2.9):
    figure = Figure(figsize=(5.2, height), layout="constrained")
    # No pyplot: its global state and its backends are not needed for SVG.
    FigureCanvasSVG(figure)
    # Transparent, so that the page's background shows in light and dark mode.
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    return figure, axes


def _curve(axes, steps, values, window):
    if window > 1:
        axes.plot(*smoothing.thin(steps, values), color=ACCENT, lw=0.7, alpha=0.28)
        axes.plot(*smoothing.smooth(steps, values, window), color=ACCENT, lw=1.7)
    else:
        mark = dict(marker="o", ms=3.2) if len(steps) <= smoothing.FEW else {}
        axes.plot(*smoothing.thin(steps, values), color=ACCENT, lw=1.6, **mark)


def _thousands(most):
    if most < 10_000:
        return lambda x, _: f"{x:,g}"
    return lambda x, _: f"{x / 1000:,g}k" if x else "0"
