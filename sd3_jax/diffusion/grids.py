"""The t's a solver visits: float32, steps + 1 of them, strictly from 1 down to 0."""

import math

import numpy as np
from jaxtyping import Float32

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


GRIDS = {
    "linear": lambda steps, shift: linear(steps),
    "shifted": shifted,
    "released": released,
}


def make(name: str, steps: int, shift: float) -> Float32[np.ndarray, " n"]:
    grid = choose("grid", name, GRIDS)
    require(steps >= 1, "steps", steps, "a whole number >= 1")
    require(0 < shift < math.inf, "shift", shift, "a finite number > 0")
    t = grid(steps, shift)
    falls = bool((np.diff(t) < 0).all())
    require(falls, "shift", shift, f"one that keeps {steps} float32 steps apart")
    return t
