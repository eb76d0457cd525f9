"""Conditional flow matching (paper, 2 and 3): regress the velocity of a path.

Or whatever `path.target` says, of a network that another formulation trains.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd3_jax.diffusion.paths import Batch, Regression, Times
from sd3_jax.diffusion.timesteps import Density


def flow_loss(
    key: Key[Array, ""],
    velocity: Callable[[Array, Array], Array],
    x0: Batch,
    *,
    density: Density,
    path: Regression,
    weight: Times | None = None,
) -> tuple[Float[Array, ""], dict[str, Times]]:
    """loss_at t ~ density: t's density is the weight over t (paper, 3.1)."""
    t_key, noise_key = jax.random.split(key)
    t = density.sample(t_key, x0.shape[:1])
    return loss_at(noise_key, velocity, x0, t, path=path, weight=weight)


def loss_at(
    key: Key[Array, ""],
    velocity: Callable[[Array, Array], Array],
    x0: Batch,
    t: Times,
    *,
    path: Regression,
    weight: Times | None = None,
) -> tuple[Float[Array, ""], dict[str, Times]]:
    """Mean squared error at given t's; an example of weight 0 does not count."""
    noise = jax.random.normal(key, x0.shape, jnp.float32)
    xt = path.interpolate(x0, noise, t)
    target = path.target(x0, noise, t)
    axes = tuple(range(1, x0.ndim))
    error = jnp.mean(jnp.square(velocity(xt, t) - target), axis=axes)
    weight = jnp.ones_like(error) if weight is None else weight
    total = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)  # all may be 0
    return (weight * error).sum() / total, {"error": error, "t": t}
