"""What a plot shows of a noisy curve: a smooth line, and the frame around it."""

from typing import Any

import numpy as np

FEW = 40  # points: up to here each is marked, beyond it they may be smoothed
LARGEST = 1e100  # beyond it the arithmetic of axes overflows


def window_for(n: int) -> int:
    """Over how many of n points to smooth."""
    return 1 if n <= FEW else max(5, n // 30)


def frame_for(values: list[float], *, zero: bool, clip: bool) -> tuple[float, float]:
    """The least and the greatest y; if `clip`, a few wild points do not flatten all."""
    low, high = 0.0 if zero else min(values), max(values)
    # One spike in a thousand steps would press the curve flat.
    if clip and (usual := float(np.quantile(values, 0.99))) > low:
        high = usual if high - low > 1.5 * (usual - low) else high
    pad = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low if zero else low - pad, high + 2 * pad


def smooth(steps, values, width, most=400):
    """At `most` places the interquartile mean of a window: no spike shows in it.

    At the start, where curves fall steeply, the window is narrow enough to be centred.
    """
    centres = np.unique(np.linspace(0, len(steps) - 1, most).astype(int))
    reach = np.minimum(centres, width // 2)
    windows = [values[i - r : i + r + 1] for i, r in zip(centres, reach)]
    # The middle half of each window: a mean that single spikes do not move.
    finite = [np.sort(window[np.isfinite(window)]) for window in windows]
    middle = [w[len(w) // 4 : len(w) - len(w) // 4] for w in finite]
    return steps[centres], [w.mean() if len(w) else np.nan for w in middle]


def thin(steps, values, most=600):
    """At most 2·most points: each bin's least and greatest, so no spike is lost."""
    if len(steps) <= 2 * most:
        return steps, values
    chosen = []
    for part in np.array_split(np.arange(len(steps)), most):
        finite = part[np.isfinite(values[part])]
        if len(finite):
            low, high = finite[values[finite].argmin()], finite[values[finite].argmax()]
            chosen += sorted({low, high})
        else:
            chosen.append(part[0])  # a gap stays a gap
    return steps[chosen], values[chosen]


def drawable(values: Any) -> np.ndarray:
    """The values as floats; NaN, a gap, for None and what is too large to draw."""
    values = np.asarray(values, float)
    return np.where(np.abs(values) <= LARGEST, values, np.nan)


def positive(values):
    """What a logarithmic axis can show; equal to the last bit is a gap."""
    values = drawable(values)
    return np.where(values > 0, values, np.nan)
