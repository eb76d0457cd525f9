"""What a network is fed and regresses, and the velocity it means (paper, 2 and 3).

Every Gaussian path z = a x0 + b noise is rectified flow's at the t of the same log-SNR,
t = b / (a + b), but for a factor: xt = z / (a + b). So all formulations share rectified
flow's x_t and t in [0, 1], with its losses, grids, solvers and guidance, and differ in
the scale of the input, the time the network is told, its target, and the t's density.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit
from jaxtyping import Array

from sd3_jax.diffusion.checks import choose
from sd3_jax.diffusion.paths import RF, Batch, Times, expand
from sd3_jax.diffusion.timesteps import CosMap, Density, Linear, inside

SIGMA_DATA = 0.5  # of x0, as EDM has it (Karras et al. 2022, table 1)
SIGMA_MAX = 80.0  # where its sampling starts


@runtime_checkable
class Prediction(Protocol):
    """What a network's answer stands for; a and b are those of its own path."""

    def scale(self, t: Times) -> Times:
        """Of xt, for the network's input."""

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch: ...

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        """noise - x0 of the x0 and the noise that the answer means."""

    def spread(self, t: float) -> float:
        """The std of xt that sampling starts with at t: its own path's pure noise."""


@dataclass(frozen=True)
class Flow:
    """Rectified flow: the velocity itself (eq 13)."""

    def scale(self, t: Times) -> Times:
        return jnp.ones_like(t)

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return noise - x0

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        return answer

    def spread(self, t: float) -> float:
        return t


@dataclass(frozen=True)
class VariancePreserving:
    """a^2 + b^2 = 1: the cosine and linear schedules, as a network sees them."""

    def scale(self, t: Times) -> Times:
        return 1 / jnp.hypot(1 - t, t)  # a + b

    def spread(self, t: float) -> float:
        return float(np.hypot(1 - t, t))


@dataclass(frozen=True)
class Noise(VariancePreserving):
    """The noise (Ho et al. 2020)."""

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return noise

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        return (answer - xt) / expand(1 - t, xt)  # x0 = (xt - t noise) / (1 - t)


@dataclass(frozen=True)
class Angular(VariancePreserving):
    """v = a noise - b x0 (Salimans & Ho 2022)."""

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        a, b = self._coefficients(x0, t)
        return a * noise - b * x0

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        a, b = self._coefficients(xt, t)  # x0 = a z - b v, noise = b z + a v
        return (b - a) * (a + b) * xt + (a + b) * answer

    def _coefficients(self, x, t):
        norm = jnp.hypot(1 - t, t)
        return expand((1 - t) / norm, x), expand(t / norm, x)


@dataclass(frozen=True)
class Preconditioned:
    """EDM's F, of x0 = c_skip z + c_out F at z = x0 + sigma noise (Karras et al. 2022).

    Everything is written in t = sigma / (1 + sigma), in which nothing is infinite.
    """

    def scale(self, t: Times) -> Times:
        return 1 / self._norm(t)  # c_in z, with z = xt / (1 - t)

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        t = expand(t, x0)  # (x0 - c_skip z) / c_out
        signal = t * x0 / SIGMA_DATA - SIGMA_DATA * (1 - t) * noise
        return signal / self._norm(t)

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        t = expand(t, xt)  # (xt - x0) / t, in which t cancels
        norm = self._norm(t)
        skip = (t - SIGMA_DATA**2 * (1 - t)) / norm**2
        return skip * xt - SIGMA_DATA / norm * answer

    def spread(self, t: float) -> float:
        return t

    def _norm(self, t):
        return jnp.hypot(t, SIGMA_DATA * (1 - t))


def log_sigma(t: Times) -> Times:
    """EDM's c_noise = ln(sigma) / 4."""
    return logit(inside(t)) / 4


@dataclass(frozen=True)
class Formulation:
    """A prediction, the density of its training t's, and the time its network is told.

    `last` is the largest t there is: from it sampling starts. As a path it has
    rectified flow's x_t, and `target` is what the network regresses, with unit weight:
    the paper's L_w (1.2) of the variant's w_t but for a constant factor.
    """

    density: Density
    prediction: Prediction = field(default_factory=Flow)
    clock: Callable[[Times], Times] = lambda t: t
    last: float = 1.0

    def interpolate(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return RF.interpolate(x0, noise, t)

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return self.prediction.target(x0, noise, t)

    def answer(self, network: Callable[[Array, Array], Array]) -> Callable:
        """The network's answer as a function of xt and t."""

        def answer(xt, t):
            return network(xt * expand(self.prediction.scale(t), xt), self.clock(t))

        return answer

    def velocity(self, network: Callable[[Array, Array], Array]) -> Callable:
        """The velocity that network(input, time) means: v(xt, t) for t in (0, last]."""
        answer = self.answer(network)
        return lambda xt, t: self.prediction.velocity(xt, answer(xt, t), t)

    def grid(self, grid: np.ndarray) -> np.ndarray:
        """A grid of t's drawn in so that it starts at `last`."""
        return np.float32(self.last) * grid

    @property
    def spread(self) -> float:
        """The std of x where sampling starts."""
        return self.prediction.spread(self.last)


EDM_LAST = SIGMA_MAX / (1 + SIGMA_MAX)
COS_LAST = 1 / (1 + 1 / np.tan(np.pi / 2 * 0.999))  # of 1000 steps; 1 has no x0
COS, LINEAR = CosMap(), Linear()
PATHS = {
    "rf": dict(),
    "edm": dict(prediction=Preconditioned(), clock=log_sigma, last=EDM_LAST),
    "eps/cos": dict(prediction=Noise(), clock=COS.cdf, last=float(COS_LAST)),
    "v/cos": dict(prediction=Angular(), clock=COS.cdf),
    "eps/linear": dict(prediction=Noise(), clock=LINEAR.cdf, last=LINEAR.last),
    "v/linear": dict(prediction=Angular(), clock=LINEAR.cdf, last=LINEAR.last),
}


def make(path: str, density: Density) -> Formulation:
    return Formulation(density, **choose("path", path, PATHS))
