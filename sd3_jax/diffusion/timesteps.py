"""Densities of the training t over (0, 1), and their shift (paper, 3.1 and 5.3.2)."""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit
from jax.scipy.stats import norm
from jaxtyping import Array, Float, Key

from sd3_jax.diffusion.checks import choose, require

EDGE = 2.0**-24  # 1 - EDGE is the largest float32 below 1

Shape = tuple[int, ...]
Times = Float[Array, "*n"]
Number = float | np.ndarray | Array


@runtime_checkable
class Density(Protocol):
    """How often each t is trained: drawn, not weighted."""

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times: ...
    def pdf(self, t: Times) -> Times: ...
    def cdf(self, t: Times) -> Times: ...


@dataclass(frozen=True)
class Uniform:
    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(jax.random.uniform(key, shape, jnp.float32))

    def pdf(self, t: Times) -> Times:
        return jnp.ones_like(t)

    def cdf(self, t: Times) -> Times:
        return t


@dataclass(frozen=True)
class LogitNormal:
    """logit t ~ N(mean, std^2): mean < 0 favours data, mean > 0 noise."""

    mean: float = 0.0
    std: float = 1.0

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = self.mean + self.std * jax.random.normal(key, shape, jnp.float32)
        return inside(jax.nn.sigmoid(u))

    def pdf(self, t: Times) -> Times:
        t = inside(t)
        return norm.pdf(logit(t), self.mean, self.std) / (t * (1 - t))

    def cdf(self, t: Times) -> Times:
        return norm.cdf(logit(inside(t)), self.mean, self.std)


@dataclass(frozen=True)
class Mode:
    """Heavy tails: scale > 0 favours the middle, < 0 the ends, 0 is uniform."""

    scale: float = 1.29

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(self._f(jax.random.uniform(key, shape, jnp.float32)))

    def pdf(self, t: Times) -> Times:
        sine = jnp.sin(jnp.pi * self._inverse(t))
        return 1 / (1 + self.scale * (1 - jnp.pi / 2 * sine))  # -1 / f'(u)

    def cdf(self, t: Times) -> Times:
        return 1 - self._inverse(t)  # f falls from 1 to 0

    def _f(self, u):
        return 1 - u - self.scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)

    def _inverse(self, t):
        """u with f(u) = t, by bisection: it has no closed form."""

        def halve(_, bounds):
            low, high = bounds
            u = (low + high) / 2
            above = self._f(u) > t
            return jnp.where(above, u, low), jnp.where(above, high, u)

        bounds = jnp.zeros_like(t), jnp.ones_like(t)
        low, high = jax.lax.fori_loop(0, 24, halve, bounds)
        return (low + high) / 2


@dataclass(frozen=True)
class CosMap:
    """Uniform in the time of the cosine schedule with the same log-SNR."""

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = jax.random.uniform(key, shape, jnp.float32)
        return inside(1 - 1 / (jnp.tan(jnp.pi / 2 * u) + 1))

    def pdf(self, t: Times) -> Times:
        return 2 / (jnp.pi - 2 * jnp.pi * t + 2 * jnp.pi * t**2)

    def cdf(self, t: Times) -> Times:
        return 2 / jnp.pi * jnp.arctan2(t, 1 - t)


@dataclass(frozen=True)
class Linear:
    """Uniform over the steps of the linear schedule of LDM: sqrt(beta) is linear.

    Between its 1000 steps the log-SNR is interpolated. It ends at t = 0.936, where
    there is still some signal (Lin et al. 2023), and begins at 0.028.
    """

    steps: int = 1000
    first_beta: float = 0.00085
    last_beta: float = 0.012

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        u = jax.random.uniform(key, shape, jnp.float32)
        return jax.nn.sigmoid(jnp.interp(u, *self._table()))

    def pdf(self, t: Times) -> Times:
        time, place = self._table()
        i = jnp.clip(jnp.searchsorted(place, logit(inside(t))), 1, self.steps - 1)
        slope = (time[i] - time[i - 1]) / (place[i] - place[i - 1])
        within = (logit(inside(t)) >= place[0]) & (logit(inside(t)) <= place[-1])
        return jnp.where(within, slope / (inside(t) * (1 - inside(t))), 0.0)

    def cdf(self, t: Times) -> Times:
        """Also the schedule's own time in [0, 1], which its networks are told."""
        time, place = self._table()
        return jnp.interp(logit(inside(t)), place, time)

    @property
    def last(self) -> float:
        """The t of the last step."""
        return float(1 / (1 + np.exp(-self._logits()[-1])))

    def _table(self):
        """Times in [0, 1] and the logit of t there, which is -log-SNR / 2."""
        return (
            jnp.linspace(0, 1, self.steps, dtype=jnp.float32),
            jnp.asarray(self._logits(), jnp.float32),
        )

    def _logits(self) -> np.ndarray:
        beta = np.linspace(self.first_beta**0.5, self.last_beta**0.5, self.steps) ** 2
        log_signal = np.cumsum(np.log1p(-beta))  # of a^2
        return (np.log(-np.expm1(log_signal)) - log_signal) / 2


@dataclass(frozen=True)
class Shifted:
    """shift(t, alpha) of a t from `density`."""

    density: Density
    alpha: float

    def sample(self, key: Key[Array, ""], shape: Shape) -> Times:
        return inside(shift(self.density.sample(key, shape), self.alpha))

    def pdf(self, t: Times) -> Times:
        slope = self.alpha / (self.alpha + (1 - self.alpha) * t) ** 2  # of the unshift
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
    """The density called `name`; each takes those options that are its own."""
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
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(tokens: int, base_tokens: int) -> float:
    """The alpha that takes t from `base_tokens` to `tokens` (eq 23)."""
    return math.sqrt(tokens / base_tokens)


def inside(t: Times) -> Times:
    """t off 0 and 1, where log-SNRs are infinite: float32 rounds sigmoid(17) to 1."""
    return jnp.clip(t, EDGE, 1 - EDGE)
