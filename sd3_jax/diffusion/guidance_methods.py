"""Guidances as small functions of velocities, in one table: METHODS.

Each function takes the Branches of a step and the scale. Its keyword arguments are the
method's numbers; their defaults are those of the paper or, where the paper has none, of
diffusers. A forward is one pass of the denoiser on the batch.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd3_jax.diffusion.paths import Batch

Number = float | int | np.ndarray | np.number | Array


class Branches(NamedTuple):
    """A step at (x, t): the velocity to follow and the one to steer away from.

    All are float32. t broadcasts against x; `grid` falls to 0 and may be padded.
    """

    x: Batch
    t: Float[Array, "b ..."]
    v_c: Batch
    v_u: Batch
    grid: Float[Array, "... n"]


def cfg(at: Branches, scale: Number) -> Batch:
    """v_u + scale (v_c - v_u): classifier-free guidance (Ho & Salimans 2022).

    Two forwards a step, as one doubled batch. In the form of Imagen and diffusers, in
    which a scale of 1 is the conditional velocity.
    """
    return at.v_u + scale * (at.v_c - at.v_u)


def cfg_zero(at: Branches, scale: Number, *, zero_steps: Number = 1) -> Batch:
    """CFG-Zero* (Fan et al. 2025): v_u is scaled to lie closest to v_c (sec. 4.1).

    Two forwards a step. The velocity is 0 in the first `zero_steps` of the grid, whose
    error the paper finds larger than that of standing still (sec. 4.2).
    """
    # eps as in diffusers' cfg_zero_star_scale.
    square = _dot(at.v_u, at.v_u) + 1e-8
    v_u = at.v_u * (_dot(at.v_c, at.v_u) / square)  # s* of the paper
    v = v_u + scale * (at.v_c - v_u)
    # By time and not by a counter: a step is known by its t in the traced program.
    first_kept = at.grid[jnp.asarray(zero_steps, jnp.int32)]
    return jnp.where(at.t > first_kept, 0.0, v)


def apg(
    at: Branches,
    scale: Number,
    average: Batch,
    *,
    eta: Number = 0.0,
    momentum: Number = -0.5,
    threshold: Number = 15.0,
) -> tuple[Batch, Batch]:
    """Adaptive projected guidance (Sadat et al. 2024, alg. 1), on velocities.

    Two forwards a step. v_c - v_u is averaged over the steps with `momentum`, cut to
    the norm `threshold` (0: not), and its part along v_c is multiplied by `eta`. As
    diffusers' AdaptiveProjectedGuidance, the result is added to v_u.
    """
    # No mean: as in diffusers' MomentumBuffer the new difference counts in full, and
    # the paper's negative momentum subtracts what was there before.
    average = at.v_c - at.v_u + momentum * average
    return at.v_u + scale * _projected(average, at.v_c, eta, threshold), average


def apg_x0(
    at: Branches,
    scale: Number,
    average: Batch,
    *,
    eta: Number = 0.0,
    momentum: Number = -0.5,
    threshold: Number = 15.0,
) -> tuple[Batch, Batch]:
    """Adaptive projected guidance (Sadat et al. 2024, alg. 1), on estimates of x0.

    Two forwards a step. This is the paper's form: D_c + (scale - 1) times the projected
    average of D_c - D_u, for D = x - t v.
    """
    x0 = at.x - at.t * at.v_c
    # D_c - D_u = -t (v_c - v_u), whence the order.
    average = at.t * (at.v_u - at.v_c) + momentum * average
    x0 = x0 + (scale - 1) * _projected(average, x0, eta, threshold)
    return (at.x - x0) / at.t, average  # no solver evaluates at t = 0


def cfg_pp(at: Branches, scale: Number) -> Batch:
    """CFG++ (Chung et al. 2024, alg. 2): Euler's step, renoised with the noise of v_u.

    Two forwards a step. The scale is the paper's lambda in [0, 1], which suggests 0.6.
    Right for Euler's method alone, whose next t is that of the grid.
    """
    # x' = (1 - t') (x - t v) + t' (x + (1 - t) v_u) for v = v_u + scale (v_c - v_u) is
    # Euler's step from t to t' along the velocity below.
    t_next = _next(at.grid, at.t)
    gain = at.t * (1 - t_next) / (at.t - t_next)
    return at.v_u + scale * gain * (at.v_c - at.v_u)


def tangential(at: Branches, scale: Number) -> Batch:
    """Tangential damping CFG (Kwon et al. 2025): CFG from a damped v_u.

    Two forwards a step. v_u is projected on the first right singular vector of the two
    velocities, which removes what is tangential to the data manifold.
    """
    # For the angle a of the first eigenvector (cos a, sin a) of the Gram matrix of
    # (v_c, v_u), the projection is sin a (cos a v_c + sin a v_u): no SVD is needed.
    g_cc, g_cu, g_uu = (_dot(*pair) for pair in _pairs(at.v_c, at.v_u))
    # arctan2 keeps the quadrant, and so the eigenvector of the larger eigenvalue; the
    # formula with arctan would swap both where |v_u| > |v_c|.
    angle = jnp.arctan2(2 * g_cu, g_cc - g_uu)  # 2 a
    # sin a cos a = sin(2 a) / 2, and sin^2 a = (1 - cos 2 a) / 2.
    v_u = (jnp.sin(angle) * at.v_c + (1 - jnp.cos(angle)) * at.v_u) / 2
    return v_u + scale * (at.v_c - v_u)


class Method(NamedTuple):
    """A row of METHODS. `combine` of a method with a state takes and returns it."""

    combine: Callable
    carries: bool = False  # a state like x, which starts at 0
    least: float = 1.0  # at this scale or below, there is no guidance
    most: float = np.inf
    # Where v_u is from: "uncond", the denoiser with the negative prompt, or "weak",
    # another denoiser with the same prompt.
    against: str = "uncond"
    reads_grid: bool = False
    forwards: int = 2  # for a velocity, the guide's counted
    perturbs: bool = False  # one more forward in the steps of its window


METHODS = {
    "cfg": Method(cfg),
    "cfg_zero": Method(cfg_zero, reads_grid=True),
    # At lambda = 0 the paper follows the negative prompt alone. Here 0 means no
    # guidance, as for all other methods.
    "cfg_pp": Method(cfg_pp, least=0.0, most=1.0, reads_grid=True),
    "apg": Method(apg, carries=True),
    "apg_x0": Method(apg_x0, carries=True),
    "tangential": Method(tangential),
    # Perturbed attention guidance (Ahn et al. 2024): three forwards a step while t is
    # in its window. guidance.guided adds scale (v_c - v_perturbed), as it does for
    # skipped layers.
    "pag": Method(cfg, perturbs=True),
    # Autoguidance (Karras et al. 2024): one forward a step of each of two denoisers.
    "autoguidance": Method(cfg, against="weak"),
}
# The range of each number that a method takes.
LIMITS = {
    "eta": (0.0, 1.0),
    # Beyond 1 in size the oldest differences would grow with every step.
    "momentum": (-1.0, 1.0),
    "threshold": (0.0, 1e6),
    "zero_steps": (0, 1000),
}


def defaults(method: str) -> dict[str, Number]:
    """The numbers of a method with their defaults."""
    # From the signatures: a default is written once, beside the formula that it is for.
    parameters = inspect.signature(METHODS[method].combine).parameters.values()
    return {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}


def _projected(update, direction, eta, threshold):
    """update, cut to the norm `threshold`, its part along `direction` times eta."""
    # Norms over all of an example, as diffusers with its default norm_dim=None. The
    # threshold of 15 thus cuts more of larger pictures.
    norm = jnp.sqrt(_dot(update, update))
    cut = jnp.minimum(1, threshold / jnp.maximum(norm, 1e-12))
    update = update * jnp.where(threshold > 0, cut, 1)
    # A network at initialisation returns 0, which has no direction.
    square = jnp.maximum(_dot(direction, direction), 1e-24)
    return update - (1 - eta) * _dot(update, direction) / square * direction


def _next(grid, t):
    """The largest time of the grid below t (b, ...), and 0 below the last."""
    # A grid's padding is 0, which is also its end: it needs no mask.
    below = jnp.where(grid < t[..., None], grid, 0)  # (b, ..., n)
    return below.max(axis=-1)


def _pairs(a, b):
    return (a, a), (a, b), (b, b)


def _dot(a, b):
    """Inner products of the rows, (b, 1, ...)."""
    return jnp.sum(a * b, axis=tuple(range(1, a.ndim)), keepdims=True)
