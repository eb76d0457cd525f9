"""Forward processes x_t = a_t x0 + b_t noise (paper, sec. 2): t = 0 is data, 1 noise.

A path also recovers x0 and noise from x_t and a velocity.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Shaped

Batch = Float[Array, "b ..."]
Times = Float[Array, " b"]


@runtime_checkable
class Regression(Protocol):
    """What losses need: a forward process, and what a network regresses."""

    def interpolate(self, x0: Batch, noise: Batch, t: Times) -> Batch: ...
    def target(self, x0: Batch, noise: Batch, t: Times) -> Batch: ...


@runtime_checkable
class Path(Regression, Protocol):
    """What solvers need as well."""

    def coefficients(self, t: Array) -> tuple[Array, Array]: ...
    def velocity(self, x0: Batch, noise: Batch, t: Times) -> Batch: ...
    def x0(self, xt: Batch, v: Batch, t: Times) -> Batch: ...
    def noise(self, xt: Batch, v: Batch, t: Times) -> Batch: ...


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines: x_t = (1 - t) x0 + t noise (paper, eq 13)."""

    def coefficients(self, t: Array) -> tuple[Array, Array]:
        return 1 - t, t  # a_t, b_t

    def interpolate(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        t = expand(t, x0)
        return (1 - t) * x0 + t * noise

    def velocity(self, x0: Batch, noise: Batch, t: Times) -> Batch:
        """dx_t/dt for given x0 and noise."""
        return noise - x0

    target = velocity  # what a network regresses

    # Both follow from x_t = x0 + t v and v = noise - x0, without a division: they hold
    # at t = 0 and t = 1 too.
    def x0(self, xt: Batch, v: Batch, t: Times) -> Batch:
        return xt - expand(t, xt) * v

    def noise(self, xt: Batch, v: Batch, t: Times) -> Batch:
        return xt + (1 - expand(t, xt)) * v


RF = RectifiedFlow()


def expand(t: Shaped[Array, " b"], x: Batch) -> Shaped[Array, "b ..."]:
    """t (b,) as (b, 1, ...), to broadcast against x."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))
