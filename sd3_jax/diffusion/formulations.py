"""Input, target and velocity of other formulations than rectified flow (paper, 2, 3).

Every Gaussian path z = a x0 + b noise equals rectified flow's at the t of the same
log-SNR, t = b / (a + b), up to a factor: xt = z / (a + b). So all formulations share
rectified flow's x_t and t in [0, 1], and its losses, grids, solvers and guidance. They
differ in the scale of the network's input, the time it is given, its target, and the
density of t.
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

SIGMA_DATA = 0.5  # std of x0 in EDM (Karras et al. 2022, table 1)
SIGMA_MAX = 80.0  # at which EDM's sampling starts


@runtime_checkable
class Prediction(Protocol):
    """What a network predicts; a and b below are coefficients of its own path."""

    def scale(self, t: Times) -> Times:
        """Factor (b,) of xt that makes the network's input."""
        ...

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        """What the network regresses."""
        ...

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        """noise - x0 that follows from xt and the network's answer."""
        ...

    def spread(self, t: float) -> float:
        """Std of the xt from which sampling starts at t: pure noise of its own path."""
        ...


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
    """Paths with a^2 + b^2 = 1, which are the cosine and linear schedules'."""

    def scale(self, t: Times) -> Times:
        # With n = hypot(1 - t, t): a = (1 - t) / n, b = t / n, z = (a + b) xt = xt / n.
        return 1 / jnp.hypot(1 - t, t)

    def spread(self, t: float) -> float:
        return float(np.hypot(1 - t, t))  # xt = n z, and z starts with std 1


@dataclass(frozen=True)
class Noise(VariancePreserving):
    """The network predicts the noise (Ho et al. 2020)."""

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return noise

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        return (answer - xt) / expand(1 - t, xt)  # x0 = (xt - t noise) / (1 - t)


@dataclass(frozen=True)
class Angular(VariancePreserving):
    """The network predicts v = a noise - b x0 (Salimans & Ho 2022)."""

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        a, b = self._coefficients(x0, t)  # (b, 1, ...) each
        return a * noise - b * x0

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        a, b = self._coefficients(xt, t)  # x0 = a z - b v, noise = b z + a v
        # noise - x0 = (b - a) z + (a + b) v, with z = (a + b) xt.
        return (b - a) * (a + b) * xt + (a + b) * answer

    def _coefficients(self, x, t):
        norm = jnp.hypot(1 - t, t)
        return expand((1 - t) / norm, x), expand(t / norm, x)


@dataclass(frozen=True)
class Preconditioned:
    """The network predicts EDM's F (Karras et al. 2022, eq 7), x0 = c_skip z + c_out F.

    z = x0 + sigma noise. Everything is written in t = sigma / (1 + sigma): sigma itself
    is infinite at t = 1.
    """

    def scale(self, t: Times) -> Times:
        return 1 / self._norm(t)  # c_in z, with z = xt / (1 - t)

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        # (x0 - c_skip z) / c_out, times (1 - t) above and below.
        t = expand(t, x0)
        signal = t * x0 / SIGMA_DATA - SIGMA_DATA * (1 - t) * noise
        return signal / self._norm(t)

    def velocity(self, xt: Batch, answer: Batch, t: Times) -> Batch:
        # (xt - x0) / t, from which t cancels: no division by 0 at t = 0.
        t = expand(t, xt)
        norm = self._norm(t)
        skip = (t - SIGMA_DATA**2 * (1 - t)) / norm**2  # from xt - c_skip z
        return skip * xt - SIGMA_DATA / norm * answer

    def spread(self, t: float) -> float:
        return t

    def _norm(self, t):
        # (1 - t) sqrt(sigma^2 + sigma_data^2)
        return jnp.hypot(t, SIGMA_DATA * (1 - t))


def log_sigma(t: Times) -> Times:
    """EDM's c_noise = ln(sigma) / 4, the time that its network is given."""
    return logit(inside(t)) / 4  # logit t = ln sigma


@dataclass(frozen=True)
class Formulation:
    """A prediction, the density of t in training, and the network's clock.

    `clock` maps t to the time that the network is given. Sampling starts at `last`, the
    largest t. The loss has unit weight on `target`, which is the paper's L_w (sec. 2)
    with the variant's w_t, up to a constant factor.
    """

    density: Density
    # The prediction's a, b and z stay inside it: all else sees xt, t and a velocity.
    prediction: Prediction = field(default_factory=Flow)
    clock: Callable[[Times], Times] = lambda t: t
    last: float = 1.0

    # Always rectified flow's x_t: `answer` rescales it for the network.
    def interpolate(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return RF.interpolate(x0, noise, t)

    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        return self.prediction.target(x0, noise, t)

    def answer(self, network: Callable[[Array, Array], Array]) -> Callable:
        """network(input, time) as a function of xt and t."""

        def answer(xt, t):
            return network(xt * expand(self.prediction.scale(t), xt), self.clock(t))

        return answer

    def velocity(self, network: Callable[[Array, Array], Array]) -> Callable:
        """v(xt, t) for t in (0, last] that follows from network(input, time)."""
        answer = self.answer(network)
        return lambda xt, t: self.prediction.velocity(xt, answer(xt, t), t)

    def grid(self, grid: np.ndarray) -> np.ndarray:
        """The grid scaled so that it starts at `last`."""
        return np.float32(self.last) * grid

    @property
    def spread(self) -> float:
        """Std of x where sampling starts."""
        return self.prediction.spread(self.last)


EDM_LAST = SIGMA_MAX / (1 + SIGMA_MAX)
# Noise prediction has no x0 at t = 1 (0 / 0): it starts one step of 1000 earlier.
COS_LAST = 1 / (1 + 1 / np.tan(np.pi / 2 * 0.999))
COS, LINEAR = CosMap(), Linear()
PATHS = {
    "rf": dict(),  # the velocity, with t itself as clock
    # Sampling starts at sigma = 80, as in Karras et al. 2022.
    "edm": dict(prediction=Preconditioned(), clock=log_sigma, last=EDM_LAST),
    # Networks on a schedule are given its own time, which is the density's cdf.
    "eps/cos": dict(prediction=Noise(), clock=COS.cdf, last=float(COS_LAST)),
    "v/cos": dict(prediction=Angular(), clock=COS.cdf),
    "eps/linear": dict(prediction=Noise(), clock=LINEAR.cdf, last=LINEAR.last),
    # LDM's schedule ends with some signal left, at t = 0.936 (Lin et al. 2023).
    "v/linear": dict(prediction=Angular(), clock=LINEAR.cdf, last=LINEAR.last),
}


def make(path: str, density: Density) -> Formulation:
    """The formulation of a key of PATHS; ConfigError for another name."""
    return Formulation(density, **choose("path", path, PATHS))
