"""A run's curves over steps and over t, with captions that name missing values."""

import math
import re

from sd3_jax.reports import html_page, number_format, plots, smoothing

CURVES = 6  # validation steps in the plot over t


def over_steps(rows, kind, title, name, *, zero=False, smooth=True):
    steps, values = series(rows, kind, name)
    # NaN and infinity would decide the frame of the plot.
    finite = [value for value in values if math.isfinite(value)]
    lost = len(values) - len(finite)
    huge = sum(abs(value) > smoothing.LARGEST for value in finite)
    finite = [value for value in finite if abs(value) <= smoothing.LARGEST]
    if not finite:
        kind_of_value = "finite value" if values else "value"
        caption = f"{title}: no {kind_of_value} of “{name}” was logged."
        return html_page.Panel(title, "", caption)
    window = smoothing.window_for(len(values)) if smooth else 1
    frame = smoothing.frame_for(finite, zero=zero, clip=window > 1)
    svg = plots.over_steps(steps, values, window=window, frame=frame)
    # Without smoothing the curve speaks for itself.
    caption = ""
    if window > 1:
        caption = f"Faint: logged values. Solid: smoothed over {window} points."
    # What the frame or the axis cannot show is counted in the caption.
    above = sum(v > frame[1] for v in finite)
    counts = {"Above the frame": above, "Not finite": lost, "Too large": huge}
    for subject, number in counts.items():
        caption += f" {subject}: {number} of {len(values)}." if number else ""
    return html_page.Panel(title, svg, caption.strip())


def by_t(rows):
    curves = {}
    for row in rows:
        matches = [re.fullmatch(r"loss_t(\d*\.?\d+)", name) for name in row]
        names = {float(match[1]): match[0] for match in matches if match}
        if row["kind"] == "val" and names:
            ts = sorted(names)
            curves[row["step"]] = ts, [number_format.finite(row[names[t]]) for t in ts]
    title = "Validation loss by t"
    if not curves:
        return html_page.Panel(title, "", "No validation loss by t was logged.")
    shown = {step: curves[step] for step in evenly_spaced(sorted(curves), CURVES)}
    caption = "Each curve is one evaluation, the last one in colour."
    return html_page.Panel(title, plots.by_t(shown), caption)


def series(rows, kind, name):
    """Steps and values; of a step that was logged twice, the later one."""
    # A run that was resumed logs some steps twice; the later row is of the weights that
    # went on.
    points = {
        row["step"]: _float(row[name])
        for row in rows
        if row["kind"] == kind and isinstance(row.get(name), int | float)
    }
    return sorted(points), [points[step] for step in sorted(points)]


def evenly_spaced(items, most):
    """At most so many, evenly, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _float(number):
    # JSON's whole numbers may have thousands of digits.
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf
