"""Schedules of the guidance scale over t, in float64 on the host.

A schedule is a factor f(t) of what guidance adds: the scale at t is
1 + (scale - 1) f(t), as in Wang et al. 2024, "Analysis of classifier-free guidance
weight schedulers". "linear" and "cosine" are their increasing ones, of mean 1.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32

from sd3_jax.diffusion.checks import choose, require
from sd3_jax.errors import ConfigError

SCHEDULES = {
    "constant": lambda t: np.ones_like(t),
    # Mean 1 over t, so that schedules are compared at the same scale: what they take
    # from noisy times they add near the data.
    "linear": lambda t: 2 * (1 - t),
    "cosine": lambda t: 1 + np.cos(np.pi * t),
}
Points = Sequence[tuple[float, float]]
PAIRS = "pairs of t in [0, 1] and a finite factor"


def scales(
    schedule: str | Points, scale: float, grid: Float[np.ndarray, " n"]
) -> Float32[np.ndarray, " n"]:
    """The scale at each time of the grid.

    `schedule` is a key of SCHEDULES, or pairs (t, factor) in any order, with straight
    lines between them and the last factor beyond them. Raises ConfigError for another
    key, and for pairs that are not of t in [0, 1] and a finite factor.
    """
    t = np.asarray(grid, np.float64)
    if isinstance(schedule, str):
        factors = choose("guidance_schedule", schedule, SCHEDULES)(t)
    else:
        factors = np.interp(t, *_columns(schedule))
    return (1 + (scale - 1) * factors).astype(np.float32)


def parsed(text: str) -> str | Points:
    """A schedule as a config spells it: a key of SCHEDULES, or "1:0.5, 0.3:2"."""
    # No key of SCHEDULES has a colon, so it tells pairs from names.
    if ":" not in text:
        choose("guidance_schedule", text, SCHEDULES)
        return text
    try:
        columns = [map(float, pair.split(":")) for pair in text.split(",")]
        pairs = [(t, factor) for t, factor in columns]
    except ValueError:  # also of one or three numbers
        pairs = []
    require(bool(pairs), "guidance_schedule", text, PAIRS)
    _columns(pairs)
    return pairs


def is_schedule(text: str) -> bool:
    """Whether `parsed` takes a text."""
    try:
        parsed(text)
    except ConfigError:
        return False
    return True


def _columns(points):
    """Times that rise, and their factors."""
    # NaN fails 0 <= t <= 1, and needs no check of its own.
    ok = len(points) > 0 and all(
        len(x) == 2 and 0 <= x[0] <= 1 and np.isfinite(x[1]) for x in points
    )
    require(ok, "guidance_schedule", points, PAIRS)
    times, factors = map(np.array, zip(*sorted(map(tuple, points))))
    require(
        bool((np.diff(times) > 0).all()), "guidance_schedule", points, "each t once"
    )
    return times, factors
