"""The weights of multistep solvers in each step of a grid.

They integrate x/b exactly but for the prediction m, which is x0 or the noise, as a
polynomial in lambda = log a/b through the last values of m.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sd3_jax.diffusion.paths import Path
from sd3_jax.diffusion.solver_loop import Integer

Steps = Float[Array, " n"]  # a number for each of the n steps of a grid


class Weights(NamedTuple):
    """The numbers of each step, with m1, m2, m3 the predictions before m:

        y  = x + correct (m - m1, m2 - m1, m3 - m1)
        x' = keep y + gain x0 + extend (m1 - m, m2 - m) + scatter noise

    Weights multiply differences, so a constant prediction is exact, whatever they are.
    """

    keep: Steps
    gain: Steps
    extend: tuple[Steps, Steps]
    correct: tuple[Steps, Steps, Steps]
    scatter: Steps


class Spacing(NamedTuple):
    """Where the steps of a grid lie in lambda.

    A step's last `usable` predictions are at a finite lambda. `h` is 1 for a step from
    t = 1 or to t = 0, which is infinite, and a ratio to a step before is 1 where that
    cannot be used: numbers whose gradient is finite, for branches not taken.
    """

    a: Steps
    b: Steps
    a_next: Steps
    b_next: Steps
    h: Steps
    r0: Steps  # the last step's h / this one's
    r1: Steps  # that of the step before it / this one's
    usable: Int[Array, " n"]
    index: Int[Array, " n"]
    left: Int[Array, " n"]  # steps to go, this one included

    @property
    def keep(self) -> Steps:
        """What is left of x, for a constant x0."""
        return self.b_next / self.b

    @property
    def gain(self) -> Steps:
        return self.a_next - self.keep * self.a


def spacing_of(
    grid: Float[Array, " n"],
    path: Path,
    steps: Integer | None,
    log: Callable[[Array, Array], Array] = lambda a, b: jnp.log(a) - jnp.log(b),
    infinite: Callable[[Array, Array], Bool[Array, " n"]] = lambda a, b: (
        (a <= 0) | (b <= 0)
    ),
) -> Spacing:
    """The steps of a grid in lambda = log(a, b), of which `steps` are taken."""
    a, b = path.coefficients(grid)
    finite = ~infinite(a, b)
    # where inside of the logarithm too: NaN in a branch that is not taken would still
    # reach the gradient.
    lambda_ = log(jnp.where(finite & (a > 0), a, 1), jnp.where(finite, b, 1))
    # Predictions at the start of this step, of the one before, and of that before it.
    # A step with an infinite end has no length in lambda, and so no ratio to its
    # neighbours: it and the one after it are of first order.
    here = finite[:-1] & finite[1:]
    second = here & jnp.pad(finite[:-2], (1, 0))
    third = second & jnp.pad(finite[:-3], (2, 0))[: len(here)]
    h = jnp.where(here, jnp.diff(lambda_), 1)
    before = lambda n: jnp.pad(h, (n, 0), constant_values=1)[: len(h)]
    index = jnp.arange(len(h))
    count = jnp.asarray(len(h) if steps is None else steps)
    return Spacing(
        *(a[:-1], b[:-1], a[1:], b[1:], h),
        r0=jnp.where(second, before(1) / h, 1),
        r1=jnp.where(third, before(2) / h, 1),
        usable=1 + second + third,
        index=index,
        left=count - index,
    )


def phi(k: int, z: Steps) -> Steps:
    """phi_k(z) = sum_j z^j / (j + k)!, the exponential integrators' functions."""
    # The recurrence divides a difference by z, which loses all digits near 0.
    small = jnp.abs(z) < 1
    # Harmless values where a branch is not taken, for the gradient's sake.
    near, far = jnp.where(small, z, 0), jnp.where(small, 1, z)
    # The first term that is left out is below 1 / 12! = 2e-9.
    series = sum(near**j * (1 / math.factorial(j + k)) for j in range(11))
    value = jnp.exp(far)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / far
    return jnp.where(small, series, value)


def extension(
    order: Int[Array, " n"], s: Spacing, slope: Steps, curve: Steps | None = None
) -> tuple[Steps, Steps]:
    """`extend` of the polynomial of so many predictions.

    `slope` and `curve` are what u and u^2 add to x' as predictions, u = 0 to 1 over
    the step. An order up to 2 needs no `curve`.
    """
    # Newton's form: m + f01 u + f012 u (u + r0), f01 = (m - m1) / r0.
    product = s.r0 * slope + (0 if curve is None else curve)  # of u (u + r0)
    line = -slope / s.r0
    # f012 = (f01 - f12) / (r0 + r1): m1 lies at u = -r0 and m2 at u = -(r0 + r1).
    parabola = (
        line - product / (s.r0 * s.r1),
        product / (s.r1 * (s.r0 + s.r1)),
    )
    first = jnp.where(order > 2, parabola[0], jnp.where(order > 1, line, 0))
    return first, jnp.where(order > 2, parabola[1], 0)


def _plain(s: Spacing, extend: tuple[Steps, Steps]) -> Weights:
    none = jnp.zeros_like(s.h)
    return Weights(s.keep, s.gain, extend, (none, none, none), none)


# --- the weights of each solver


def _deis(order: int) -> Callable:
    """DEIS (Zhang & Chen 2022): the noise as a polynomial in log rho, rho = b / a."""

    def weights(grid, path, steps):
        s = spacing_of(grid, path, steps)
        # d rho = -h rho du on the step, and rho falls as e^(-h u) from b / a.
        one, two, three = (phi(k, -s.h) for k in (1, 2, 3))
        # At t = 1 a is 0: the order there is 1, and this scale is not used.
        scale = -s.h * s.a_next * s.b / jnp.where(s.a > 0, s.a, 1)
        slope = scale * (one - two)
        curve = scale * (one - 2 * two + 2 * three)
        return _plain(s, extension(_lowered(order, s), s, slope, curve))

    return weights


def _dpmpp_3m(grid, path, steps):
    """DPM-Solver++(3M) (Lu et al. 2022) as released and in diffusers.

    Its third-order term is half of the integral's, so that it is of second order.
    """
    s = spacing_of(grid, path, steps)
    order = _lowered(3, s)
    line = extension(order, s, s.gain / 2)[0]  # the midpoint rule, at order 2
    slope, curve = (s.a_next * s.h * phi(k, -s.h) for k in (2, 3))
    third = extension(order, s, slope, curve)
    return _plain(s, (jnp.where(order > 2, third[0], line), third[1]))


def _lowered(order: int, s: Spacing) -> Int[Array, " n"]:
    """The order of each step, as in diffusers: less in the last steps of under 15."""
    # 15 is written out in diffusers (DPM-Solver and DEIS): grids of more steps end at
    # full order.
    most = jnp.where(s.left + s.index < 15, s.left, order)
    return jnp.minimum(jnp.minimum(s.usable, order), most)


def _unipc(order: int) -> Callable:
    """UniPC (Zhao et al. 2023) with B(h) = e^h - 1, which diffusers calls bh2.

    A prediction corrects the step that led to it. That is no further evaluation, and
    raises the order by one.
    """

    def weights(grid, path, steps):
        s = spacing_of(grid, path, steps)
        # UniPC lowers its order at the end of grids of any length (diffusers:
        # this_order).
        p = jnp.minimum(jnp.minimum(s.usable, order), s.left)
        h_phi = [phi(k, -s.h) / phi(1, -s.h) for k in (2, 3, 4)]
        slope, curve, cube = (
            s.gain * math.factorial(k) * h for k, h in enumerate(h_phi, 1)
        )
        # Two predictions alone are given the limit of small h, where phi2 / phi1 = 1/2.
        # diffusers sets rhos_p, and rhos_c of a first-order corrector, to 0.5.
        half = jnp.where(p > 2, slope, s.gain / 2)
        extend = extension(p, s, half, curve)
        # The corrector's polynomial has m at u = 1 too: its divided difference times
        # (u - u0) (u - u1) .. is what it adds to the exact predictor's.
        exact = extension(p, s, slope, curve)
        at_end = extension(p, s, jnp.ones_like(s.h), jnp.ones_like(s.h))
        far = s.r0 + s.r1
        two = (curve + s.r0 * slope) / (1 + s.r0)
        three = cube + (s.r0 + far) * curve + s.r0 * far * slope
        three = three / ((1 + s.r0) * (1 + far))
        new = jnp.where(p > 2, three, jnp.where(p > 1, two, s.gain / 2))
        old = [e - x - new * end for e, x, end in zip(exact, extend, at_end)]
        # They belong to the step after the one that they correct.
        late = tuple(jnp.pad(w[:-1], (1, 0)) for w in (new, *old))
        return _plain(s, extend)._replace(correct=late)

    return weights


def _res_2m(grid, path, steps):
    """RES 2M (Zhang et al. 2023), ComfyUI's res_multistep without noise.

    Like DPM-Solver++(2M) as released, in lambda = -log b, with the exact integral.
    """
    # At t = 1 this lambda is 0, where log a/b is infinite: here the second step of a
    # grid from t = 1 is of second order already.
    s = spacing_of(grid, path, steps, lambda a, b: -jnp.log(b), lambda a, b: b <= 0)
    slope = s.gain * phi(2, -s.h) / phi(1, -s.h)
    return _plain(s, extension(jnp.minimum(s.usable, 2), s, slope))


MULTISTEP = {
    "dpmpp_3m_flow": _dpmpp_3m,
    "unipc_2": _unipc(2),
    "unipc_3": _unipc(3),
    "deis_2": _deis(2),
    "deis_3": _deis(3),
    "res_2m": _res_2m,
}
# Of these m is the noise, of the others x0.
OF_NOISE = ("deis_2", "deis_3")
