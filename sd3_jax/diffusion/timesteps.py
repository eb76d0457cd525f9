"""Densities of t in training, and their shift (paper, sec. 3.1 and 5.3.2)."""

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key

from sd3_jax.diffusion.checks import choose, require

EDGE = 2.0**-24  # 1 - EDGE is the largest float32 below 1: t stays inside (0, 1)

Shape = tuple[int, ...]
Times = Float[Array, "*n"]
Number = TypeVar("Number", float, np.ndarray, Array)


@runtime_checkable
class Density(Protocol):
    """A density of t over (0, 1) from which training draws, in float32.

    Drawing t takes the place of weighting the loss (paper, sec. 3.1).
    """

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times: ...
    def pdf(self, t: Times) -> Times: ...
    def cdf(self, t: Times) -> Times: ...


@dataclass(frozen=True)
class Uniform:
    """The density of plain rectified flow (Liu et al. 2022)."""

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(jax.random.uniform(key, shape, jnp.float32))

    def pdf(self, t: Times) -> Times:
        return jnp.ones_like(t)

    def cdf(self, t: Times) -> Times:
        return t


@dataclass(frozen=True)
class LogitNormal:
    """logit t ~ N(mean, std^2) (eq 19): mean < 0 favours data, mean > 0 noise."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = self.mean + self.std * jax.random.normal(key, shape, jnp.float32)
        return inside(jax.nn.sigmoid(u))

    def pdf(self, t: Times) -> Times:
        t = inside(t)
        # d logit(t) / dt = 1 / (t (1 - t))
        return norm.pdf(logit(t), self.mean, self.std) / (t * (1 - t))

    def cdf(self, t: Times) -> Times:
        return norm.cdf(logit(inside(t)), self.mean, self.std)


@dataclass(frozen=True)
class Mode:
    """Mode sampling with heavy tails (eq 20): t = f(u) of a uniform u.

    scale > 0 favours the middle, < 0 the ends; 0 is uniform.
    """

    scale: float = 1.29  # the paper's rf/mode(1.29), in its table 1

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(self._f(jax.random.uniform(key, shape, jnp.float32)))

    def pdf(self, t: Times) -> Times:
        sine = jnp.sin(jnp.pi * self._inverse(t))
        return 1 / (1 + self.scale * (1 - jnp.pi / 2 * sine))  # -1 / f'(u)

    def cdf(self, t: Times) -> Times:
        return 1 - self._inverse(t)  # f falls from 1 to 0

    def _f(self, u):
        """Falls monotonically from 1 to 0 for scale in [-1, 2 / (pi - 2)]."""
        return 1 - u - self.scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)

    def _inverse(self, t):
        """u with f(u) = t, by bisection: it has no closed form."""

        def halve(_, bounds):
            low, high = bounds
            u = (low + high) / 2
            above = self._f(u) > t
            return jnp.where(above, u, low), jnp.where(above, high, u)

        bounds = jnp.zeros_like(t), jnp.ones_like(t)
        low, high = jax.lax.fori_loop(0, 24, halve, bounds)  # float32 has 24 bits
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap:
    """Uniform in the cosine schedule's time at the same log-SNR (eq 21).

    `cdf` is that time, which networks on the cosine schedule are given.
    """

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = jax.random.uniform(key, shape, jnp.float32)
        return inside(1 - 1 / (jnp.tan(jnp.pi / 2 * u) + 1))  # tan is the path's sigma

    def pdf(self, t: Times) -> Times:
        return 2 / (jnp.pi - 2 * jnp.pi * t + 2 * jnp.pi * t**2)

    def cdf(self, t: Times) -> Times:
        return 2 / jnp.pi * jnp.arctan2(t, 1 - t)  # arctan2: no division by 0 at 1


@dataclass(frozen=True)
class Linear:
    """Uniform over the steps of LDM's schedule, in which sqrt(beta) is linear.

    The log-SNR is interpolated between its 1000 steps. t runs from 0.028 to 0.936,
    where some signal is left (Lin et al. 2023).
    """

    steps: int = 1000
    first_beta: float = 0.00085  # of LDM and Stable Diffusion 1 and 2
    last_beta: float = 0.012

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = jax.random.uniform(key, shape, jnp.float32)
        return jax.nn.sigmoid(jnp.interp(u, *self._table()))

    def pdf(self, t: Times) -> Times:
        time, place = self._table()
        # The derivative of the interpolated cdf: one slope in each interval of logit t.
        i = jnp.clip(jnp.searchsorted(place, logit(inside(t))), 1, self.steps - 1)
        slope = (time[i] - time[i - 1]) / (place[i] - place[i - 1])
        within = (logit(inside(t)) >= place[0]) & (logit(inside(t)) <= place[-1])
        # Outside the schedule nothing is trained.
        return jnp.where(within, slope / (inside(t) * (1 - inside(t))), 0.0)

    def cdf(self, t: Times) -> Times:
        """Also the schedule's own time in [0, 1], which its networks are given."""
        time, place = self._table()
        return jnp.interp(logit(inside(t)), place, time)

    @property
    def last(self) -> float:
        """The t of the last step."""
        return float(1 / (1 + np.exp(-self._logits()[-1])))

    def _table(self):
        """(times of the schedule in [0, 1], logit t = -log-SNR / 2 there)."""
        return (
            jnp.linspace(0, 1, self.steps, dtype=jnp.float32),
            jnp.asarray(self._logits(), jnp.float32),
        )

    def _logits(self) -> np.ndarray:
        beta = np.linspace(self.first_beta**0.5, self.last_beta**0.5, self.steps) ** 2
        # float64 and log1p: 1 - a^2 cancels in the first steps, where beta is 8.5e-4.
        log_signal = np.cumsum(np.log1p(-beta))  # log a^2
        return (np.log(-np.expm1(log_signal)) - log_signal) / 2


@dataclass(frozen=True)
class Shifted:
    """The density of shift(t, alpha) for t from `density` (paper, sec. 5.3.2)."""

    density: Density
    alpha: float

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(shift(self.density.sample(key, shape), self.alpha))

    def pdf(self, t: Times) -> Times:
        # The derivative of shift(t, 1 / alpha), which undoes the shift.
        slope = self.alpha / (self.alpha + (1 - self.alpha) * t) ** 2
        return slope * self.density.pdf(shift(t, 1 / self.alpha))

    def cdf(self, t: Times) -> Times:
        return self.density.cdf(shift(t, 1 / self.alpha))


DENSITIES = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "linear": Linear,
}


def make(
    name: str, *, mean: float, std: float, mode_scale: float, shift: float
) -> Density:
    """The shifted density of a key of DENSITIES.

    Raises ConfigError for an unknown name and for values out of range. Options of
    other densities are checked too, and not used.
    """
    density = choose("density", name, DENSITIES)
    inf, steepest = math.inf, 2 / (math.pi - 2)  # a mode beyond it is not monotone
    require(-inf < mean < inf, "mean", mean, "a finite number")
    require(0 < std < inf, "std", std, "a finite number > 0")
    require(
        -1 <= mode_scale <= steepest,
        "mode_scale",
        mode_scale,
        f"a number in [-1, 2 / (pi - 2) = {steepest:.4f}]",
    )
    require(0 < shift < inf, "shift", shift, "a finite number > 0")
    options = {
        "logit_normal": dict(mean=mean, std=std),
        "mode": dict(scale=mode_scale),
    }
    return Shifted(density(**options.get(name, {})), alpha=shift)


def shift(t: Number, alpha: float) -> Number:
    """The t of equal uncertainty at alpha^2 times as many tokens (eq 23)."""
    # alpha t / (1 + (alpha - 1) t): keeps 0 and 1, and multiplies t / (1 - t) by alpha.
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(tokens: int, base_tokens: int) -> float:
    """The alpha that takes t from `base_tokens` to `tokens` (eq 23)."""
    return math.sqrt(tokens / base_tokens)


def inside(t: Times) -> Times:
    """t clipped to the open interval (0, 1): log-SNRs are infinite at its ends."""
    # float32 rounds sigmoid(17) to 1, and uniform draws include 0.
    return jnp.clip(t, EDGE, 1 - EDGE)
