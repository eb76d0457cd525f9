"""Solvers that add new noise in every step, from draw(step): each keeps the marginals.

Their result is a sample of the same distribution, at another place than an ODE's. More
steps do not approach one picture.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from sd3_jax.diffusion.multistep_solvers import choose_weights, run
from sd3_jax.diffusion.multistep_weights import (
    Spacing,
    Weights,
    extension,
    phi,
    spacing_of,
)
from sd3_jax.diffusion.paths import RF, Batch, Path
from sd3_jax.diffusion.solver_loop import (
    After,
    Draw,
    Grid,
    Integer,
    Solution,
    Velocity,
    loop,
    times,
)


def lcm(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    draw: Draw,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """Consistency sampling (Luo et al. 2023), for models that are distilled for it.

    Each step goes to the x0 estimate, and back to the next t with the new noise
    draw(step). It is a random walk: more steps do not approach the solution of an ODE.
    """
    grid = jnp.asarray(grid, jnp.float32)
    a, b = path.coefficients(grid)

    def step(x, _, i, t, a_next, b_next):
        t = times(t, x)
        x0 = path.x0(x, velocity(x, t), t)
        return a_next * x0 + b_next * draw(i), None  # b is 0 at t = 0: no noise

    columns = jnp.arange(len(grid) - 1), grid[:-1], a[1:], b[1:]  # each (n - 1,)
    return loop(velocity, step, x, None, grid, columns, trajectory, after, steps)


def stochastic(
    velocity: Velocity,
    x: Batch,
    grid: Grid,
    *,
    solver: str | Integer,
    draw: Draw,
    path: Path = RF,
    trajectory: bool = False,
    after: After | None = None,
    steps: Integer | None = None,
) -> Solution:
    """A solver of STOCHASTIC, by its name or by its number there, which may be traced.

    euler_ancestral, dpmpp_2m_sde and dpmpp_3m_sde, all with eta = 1.
    """
    grid = jnp.asarray(grid, jnp.float32)
    weights = choose_weights(STOCHASTIC, solver, grid, path, steps)
    return run(
        velocity,
        x,
        grid,
        weights,
        draw=draw,
        path=path,
        trajectory=trajectory,
        after=after,
        steps=steps,
    )


def _euler_ancestral(grid, path, steps):
    """Euler's step to below t', and noise up to t' (ComfyUI, euler_ancestral_RF).

    With eta = 1 it goes down to t'^2 / t. x is scaled by a' / a there, so that the
    noise that is added and that of x make b'.
    """
    a, b = path.coefficients(grid)
    a, b, a_next, b_next = a[:-1], b[:-1], a[1:], b[1:]
    # ComfyUI: sigma_down = sigma' (1 + (sigma' / sigma - 1) eta), here with eta = 1.
    a_down, b_down = path.coefficients(grid[1:] ** 2 / grid[:-1])
    keep = b_down / b
    ratio = a_next / a_down
    gain = ratio * (a_down - keep * a)
    # ComfyUI's renoise_coeff, squared: the noise that is missing to b' after x is
    # rescaled.
    variance = b_next**2 - (ratio * b_down) ** 2
    return _weights(ratio * keep, gain, variance)


def _sde(order: int) -> Callable:
    """DPM-Solver++ of the reverse SDE, x0 as a polynomial in lambda.

    Of two predictions: the midpoint rule, as in diffusers and ComfyUI. Of three: as in
    k-diffusion and ComfyUI (sample_dpmpp_3m_sde), half of the integral's last term.
    """

    def weights(grid, path, steps):
        s = spacing_of(grid, path, steps)
        # e^-h, without the logarithms that are infinite at t = 1 and t = 0.
        fall = s.a * s.b_next / (s.a_next * s.b)
        spent = 1 - jnp.square(fall)  # 1 - e^-2h
        # diffusers' sde-dpmsolver++ and ComfyUI's sample_dpmpp_2m_sde agree in these
        # coefficients, with eta = 1.
        gain = s.a_next * spent
        extend = _extension(order, s, gain)
        rest = _weights(s.keep * fall, gain, jnp.square(s.b_next) * spent)
        return rest._replace(extend=extend)

    return weights


def _extension(order: int, s: Spacing, gain: Array):
    usable = jnp.minimum(s.usable, order)
    # The midpoint rule and not the integral: of the same order, and what the other
    # tools have.
    if order == 2:
        return extension(usable, s, gain / 2)
    # The SDE's exponential falls twice as fast in lambda as the ODE's.
    slope, curve = (s.a_next * 2 * s.h * phi(k, -2 * s.h) for k in (2, 3))
    return extension(usable, s, slope, curve)


def _weights(
    keep: Float[Array, " n"], gain: Float[Array, " n"], variance: Float[Array, " n"]
) -> Weights:
    none = jnp.zeros_like(keep)
    # The gradient of a root at 0 is infinite, and a step to t = 0 adds no noise.
    noisy = variance > 0
    scatter = jnp.where(noisy, jnp.sqrt(jnp.where(noisy, variance, 1)), 0)
    return Weights(keep, gain, (none, none), (none, none, none), scatter)


STOCHASTIC = {
    "euler_ancestral": _euler_ancestral,
    "dpmpp_2m_sde": _sde(2),
    "dpmpp_3m_sde": _sde(3),
}
