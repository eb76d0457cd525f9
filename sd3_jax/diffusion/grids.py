"""The t's a solver visits: float32, steps + 1 of them, falling from noise to 0."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import betaincinv

from sd3_jax.diffusion import timesteps
from sd3_jax.diffusion.checks import choose, require


def linear(steps: int) -> Float32[np.ndarray, " n"]:
    return np.linspace(1, 0, steps + 1).astype(np.float32)


def shifted(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """The linear grid shifted to more tokens (paper, eq 23)."""
    t = np.linspace(1, 0, steps + 1)
    return timesteps.shift(t, shift).astype(np.float32)


def released(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """What the released models are sampled with.

    Its last t before 0 is shifted twice, once as the end of the line and again with
    the rest, so it is the same for any steps > 1: 0.008929 if shift is 3.
    """
    end = timesteps.shift(1 / 1000, shift)
    t = timesteps.shift(np.linspace(1, end, steps), shift)
    return np.append(t, 0).astype(np.float32)


def flow(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """diffusers' for its multistep solvers on flows: from just below 1, to a large t
    and then 0."""
    t = timesteps.shift(np.linspace(0.999, 0, steps + 1)[:-1], shift)
    return np.append(t, 0).astype(np.float32)


def linear_mu(
    tokens: int,
    *,
    base: tuple[int, float] = (256, 0.5),
    most: tuple[int, float] = (4096, 1.15),
) -> float:
    """mu by the image's tokens, on the line through (tokens, mu) `base` and `most`."""
    (n0, mu0), (n1, mu1) = base, most
    return mu0 + (mu1 - mu0) * (tokens - n0) / (n1 - n0)


def custom(sigmas: Sequence[float] | np.ndarray) -> Float64[np.ndarray, " n"]:
    """The t's that are given, without the 0 at their end."""
    t = np.asarray(sigmas, np.float64)
    falls = t.ndim == 1 and t.size > 0 and bool((np.diff(t) < 0).all())
    inside = falls and bool(0 < t[-1] and t[0] <= 1)
    require(
        inside, "sigmas", list(sigmas), "numbers that fall, from 1 at most, above 0"
    )
    return t


def stretched(t: Float64[np.ndarray, " n"], end: float) -> Float64[np.ndarray, " n"]:
    """Distances from 1 scaled until the last t is `end` (`shift_terminal`)."""
    require(bool(t[-1] < 1), "steps", len(t), "2 or more, for a shift_terminal")
    return 1 - (1 - t) * (1 - end) / (1 - t[-1])


def karras(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """As many, even in t^(1/7), between the same ends (Karras et al. 2022, eq 5)."""
    return np.linspace(t[0] ** (1 / 7), t[-1] ** (1 / 7), len(t)) ** 7


def exponential(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """As many, even in log t, between the same ends."""
    return np.exp(np.linspace(math.log(t[0]), math.log(t[-1]), len(t)))


def beta(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """As many, at quantiles of Beta(0.6, 0.6) between the same ends (Lee et al. 2024):
    dense near both."""
    share = betaincinv(0.6, 0.6, np.linspace(1, 0, len(t)))
    return t[-1] + share * (t[0] - t[-1])


SPACINGS = {"": lambda t: t, "karras": karras, "exponential": exponential, "beta": beta}


def strength(
    grid: Float32[np.ndarray, " n"], strength: float
) -> Float32[np.ndarray, " m"]:
    """The last `strength` of the steps: what is left of them for a given image."""
    steps = len(grid) - 1
    require(0 < strength <= 1, "strength", strength, "a number in (0, 1]")
    start = int(max(steps - min(steps * strength, steps), 0))
    least = f"at least {1 / steps:.3g}, a step of {steps}"
    require(start < steps, "strength", strength, least)
    return grid[start:]


def skip_window(
    grid: Float32[np.ndarray, " n"], start: float, stop: float
) -> tuple[np.float32, np.float32]:
    """[low, high] in t of the steps i of n with n start < i < n stop."""
    n = len(grid) - 1
    return _window(grid, [n * start < i < n * stop for i in range(n)])


def control_window(
    grid: Float32[np.ndarray, " n"], start: float, stop: float
) -> tuple[np.float32, np.float32]:
    """[low, high] in t of the steps i of n with i / n >= start, (i + 1) / n <= stop."""
    n = len(grid) - 1
    keep = [not (i / n < start or (i + 1) / n > stop) for i in range(n)]
    return _window(grid, keep)


def _window(grid, keep):
    chosen = grid[:-1][np.array(keep, bool)]
    if not chosen.size:
        return np.float32(2), np.float32(-1)  # no t is in it
    return chosen.min(), chosen.max()


GRIDS = {
    "linear": lambda steps, shift: linear(steps),
    "shifted": shifted,
    "released": released,
    "flow": flow,
}


def make(name: str, steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    grid = choose("grid", name, GRIDS)
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    require(0 < shift < math.inf, "shift", shift, "a finite number > 0")
    return apart(grid(steps, shift), shift)


def apart(t: np.ndarray, shift: float) -> Float32[np.ndarray, " n"]:
    """float32, or an error where a shift so far from 1 leaves no room between them."""
    t = t.astype(np.float32)
    falls = bool((np.diff(t) < 0).all())
    require(falls, "shift", shift, f"one that keeps {len(t) - 1} float32 steps apart")
    return t
