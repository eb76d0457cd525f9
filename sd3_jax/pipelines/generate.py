"""Noise to latents: the one sampler, which the jobs and the evaluations call."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from sd3_jax.diffusion import guidance
from sd3_jax.pipelines.prompts import Conditioning


def generate(
    velocity: Callable[[Array, Array, Conditioning], Array],
    keys: Key[Array, " b"],
    cond: Conditioning,
    uncond: Conditioning,
    *,
    shape: tuple[int, int, int],
    grid: Float[np.ndarray, " n"],
    solver: Callable,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Float[Array, "b h w c"]:
    """Latents of `shape` (h, w, c), each from its own key, so a picture is the same
    alone and in a batch; the solver runs down the grid of t's under CFG."""
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    guided = guidance.cfg(
        velocity, cond, uncond, scale=scale, interval=interval, rescale=rescale
    )
    return solver(guided, noise, grid)
