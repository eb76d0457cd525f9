"""Grids of t for solvers: float32, steps + 1 values that fall from noise to 0.

They are computed in float64 on the host and rounded once.
"""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from jaxtyping import Float32, Float64
from scipy.special import betaincinv

from sd3_jax.diffusion import timesteps
from sd3_jax.diffusion.checks import choose, require


def linear(steps: int) -> Float32[np.ndarray, " n"]:
    """Evenly spaced from 1 to 0."""
    return np.linspace(1, 0, steps + 1).astype(np.float32)


def shifted(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """The linear grid, shifted for more tokens (paper, eq 23)."""
    t = np.linspace(1, 0, steps + 1)  # 1 and 0 stay where they are
    return timesteps.shift(t, shift).astype(np.float32)


def released(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """The grid of FlowMatchEulerDiscreteScheduler, for released models."""
    # diffusers shifts sigma_min = 1/1000 when the scheduler is built, and all sigmas
    # once more when steps are set. So the last t before 0 is shifted twice: 0.008929
    # for shift 3 and any steps > 1.
    return np.append(_released(steps, shift), 0).astype(np.float32)


def _released(steps, shift):
    end = timesteps.shift(1 / 1000, shift)  # once
    return timesteps.shift(np.linspace(1, end, steps), shift)  # and again with the rest


def flow(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """diffusers' grid for multistep solvers on flows."""
    # Below 1, where lambda = log a/b is infinite; the last step to 0 is a large one.
    t = timesteps.shift(np.linspace(0.999, 0, steps + 1)[:-1], shift)
    return np.append(t, 0).astype(np.float32)


def unipc(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """The grid of diffusers' UniPCMultistepScheduler on flows."""
    t = timesteps.shift(np.linspace(1, 0.001, steps + 1)[:-1], shift)
    return np.append(below_one(t), 0).astype(np.float32)


def sgm_uniform(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """ComfyUI's scheduler of this name: the last step to 0 is as long as the others."""
    # From comfy/samplers.py, normal_scheduler with sgm, on ModelSamplingDiscreteFlow,
    # whose sigma_min is shifted once and all times once more. Without sgm: `released`.
    end = timesteps.shift(1 / 1000, shift)
    t = timesteps.shift(np.linspace(1, end, steps + 1)[:-1], shift)
    return np.append(t, 0).astype(np.float32)


def simple(steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """ComfyUI's scheduler of this name: steps of whole 1/1000s, shifted.

    Raises ConfigError for more than 1000 steps.
    """
    require(steps <= 1000, "steps", steps, "at most 1000 with the grid simple")
    # int() of the product and not of the quotient, as comfy/samplers.py rounds.
    numbers = [1000 - int(i * (1000 / steps)) for i in range(steps)]
    t = timesteps.shift(np.array(numbers) / 1000, shift)
    return np.append(t, 0).astype(np.float32)


def linear_mu(
    tokens: int,
    *,
    base: tuple[int, float] = (256, 0.5),
    most: tuple[int, float] = (4096, 1.15),
) -> float:
    """mu = ln(shift) for a number of tokens, on the line through `base` and `most`.

    Both are (tokens, mu); the defaults are those of diffusers' dynamic shifting.
    """
    (n0, mu0), (n1, mu1) = base, most
    return mu0 + (mu1 - mu0) * (tokens - n0) / (n1 - n0)


def custom(sigmas: Sequence[float] | np.ndarray) -> Float64[np.ndarray, " n"]:
    """A user's sigmas as t, without the final 0; ConfigError unless they fall."""
    t = np.asarray(sigmas, np.float64)
    # NaN fails every comparison, and with it the check.
    falls = t.ndim == 1 and t.size > 0 and bool((np.diff(t) < 0).all())
    inside = falls and bool(0 < t[-1] and t[0] <= 1)
    require(
        inside, "sigmas", list(sigmas), "numbers that fall, from 1 at most, above 0"
    )
    return t


def below_one(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """t with a first value of 1 made 1 - 1e-6, as diffusers does for UniPC."""
    # There lambda = log a/b is finite, and the first step a large one of many.
    return np.append(min(t[0], 1 - 1e-6), t[1:]) if abs(t[0] - 1) < 1e-6 else t


def stretched(t: Float64[np.ndarray, " n"], end: float) -> Float64[np.ndarray, " n"]:
    """1 - t scaled so that the last t is `end`, as diffusers' shift_terminal does."""
    require(bool(t[-1] < 1), "steps", len(t), "2 or more with a shift_terminal")
    return 1 - (1 - t) * (1 - end) / (1 - t[-1])


def karras(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """len(t) values even in t^(1/7), between t's ends (Karras et al. 2022, eq 5)."""
    return np.linspace(t[0] ** (1 / 7), t[-1] ** (1 / 7), len(t)) ** 7


def exponential(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """len(t) values even in log t, between the ends of t."""
    return np.exp(np.linspace(math.log(t[0]), math.log(t[-1]), len(t)))


def beta(t: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """len(t) values at quantiles of Beta(0.6, 0.6), dense near both ends of t.

    Lee et al. 2024.
    """
    share = betaincinv(0.6, 0.6, np.linspace(1, 0, len(t)))
    return t[-1] + share * (t[0] - t[-1])


# By the scheduler's field: use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas.
SPACINGS = {"": lambda t: t, "karras": karras, "exponential": exponential, "beta": beta}


def respaced(steps: int, shift: float, name: str) -> Float32[np.ndarray, " n"]:
    """A spacing between the ends of `released`, as in diffusers' Euler scheduler."""
    t = SPACINGS[name](_released(steps, shift))
    return np.append(t, 0).astype(np.float32)


def strength(
    grid: Float32[np.ndarray, " n"], strength: float
) -> Float32[np.ndarray, " m"]:
    """The last `strength` of the steps, for sampling that starts from an image.

    Raises ConfigError outside (0, 1], and if no step is left.
    """
    steps = len(grid) - 1
    require(0 < strength <= 1, "strength", strength, "a number in (0, 1]")
    # Rounded as in diffusers' img2img: int() of the steps that are left out.
    start = int(max(steps - min(steps * strength, steps), 0))
    least = f"at least {1 / steps:.3g}, a step of {steps}"
    require(start < steps, "strength", strength, least)
    return grid[start:]


def skip_window(
    grid: Float32[np.ndarray, " n"], start: float, stop: float
) -> tuple[np.float32, np.float32]:
    """[low, high] in t of the steps i of n with n start < i < n stop."""
    # Both strict, as in the released pipelines: step 0 is never in it.
    n = len(grid) - 1
    return _window(grid, [n * start < i < n * stop for i in range(n)])


def control_window(
    grid: Float32[np.ndarray, " n"], start: float, stop: float
) -> tuple[np.float32, np.float32]:
    """[low, high] in t of the steps i of n with i / n >= start, (i + 1) / n <= stop."""
    # diffusers' control_guidance_start and _end, with its comparisons.
    n = len(grid) - 1
    keep = [not (i / n < start or (i + 1) / n > stop) for i in range(n)]
    return _window(grid, keep)


def _window(grid, keep):
    # Steps are known by their t in a traced program, so a window is a range of t.
    chosen = grid[:-1][np.array(keep, bool)]
    if not chosen.size:
        return np.float32(2), np.float32(-1)  # low > high: no t is in it
    return chosen.min(), chosen.max()


GRIDS = {
    "linear": lambda steps, shift: linear(steps),
    "shifted": shifted,
    "released": released,
    "flow": flow,
    "unipc": unipc,
    "sgm_uniform": sgm_uniform,
    "simple": simple,
    **{name: partial(respaced, name=name) for name in SPACINGS if name},
}


def make(name: str, steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    """The grid of a key of GRIDS; ConfigError for values out of range."""
    grid = choose("grid", name, GRIDS)
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    require(0 < shift < math.inf, "shift", shift, "a finite number > 0")
    return apart(grid(steps, shift), shift)


def apart(t: np.ndarray, shift: float) -> Float32[np.ndarray, " n"]:
    """t in float32; ConfigError if a shift so far from 1 makes neighbours equal."""
    t = t.astype(np.float32)
    # Equal neighbours would be a step of 0, by which dpmpp_2m divides.
    falls = bool((np.diff(t) < 0).all())
    require(falls, "shift", shift, f"one that keeps {len(t) - 1} float32 steps apart")
    return t
