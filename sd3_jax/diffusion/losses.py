"""Conditional flow matching (paper, sec. 2 and 3): regress the velocity of a path.

Other formulations regress what their `target` says, with the same loss.
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
    """loss_at of t ~ density, drawn for each example.

    The density takes the place of a weight over t (paper, sec. 3.1).
    """
    t_key, noise_key = jax.random.split(key)
    t = density.sample(t_key, x0.shape[:1])  # (b,)
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
    """(weighted mean of squared errors, {"error": (b,), "t": (b,)}) at times t (b,).

    The error of an example is the mean over its elements. An example of weight 0 does
    not count. float32.
    """
    # float32: x_t and the target are differences that bfloat16 would round.
    noise = jax.random.normal(key, x0.shape, jnp.float32)
    xt = path.interpolate(x0, noise, t)  # (b, ...)
    target = path.target(x0, noise, t)
    axes = tuple(range(1, x0.ndim))  # all but the batch
    error = jnp.mean(jnp.square(velocity(xt, t) - target), axis=axes)  # (b,)
    weight = jnp.ones_like(error) if weight is None else weight
    # All weights of a batch may be 0: the loss is then 0 and not NaN.
    total = jnp.maximum(weight.sum(), jnp.finfo(jnp.float32).tiny)
    return (weight * error).sum() / total, {"error": error, "t": t}
