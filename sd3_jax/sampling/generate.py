"""Noise to latents: the only sampling loop, for jobs, evaluations and the API."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key, PyTree

from sd3_jax.diffusion import guidance, solvers
from sd3_jax.diffusion.carried import Carried, Remembering
from sd3_jax.diffusion.paths import RF
from sd3_jax.sampling.latents import to_rgb as linear_rgb
from sd3_jax.sampling.text.prompts import Conditioning

Preview = Callable[[np.ndarray, np.ndarray, np.ndarray], None]


def generate(
    velocity: Callable[[Array, Array, Conditioning], Array],
    *args: Any,
    **options: Any,
) -> Float[Array, "*n b h w c"]:
    """The latents of generate_with_state, for a velocity without a state."""
    return generate_with_state(velocity, *args, **options)[0]


def generate_with_state(
    velocity: Callable[[Array, Array, Conditioning], Array] | Remembering,
    keys: Key[Array, " b"] | None,
    cond: Conditioning,
    uncond: Conditioning,
    *,
    shape: tuple[int, int, int],
    grid: Float[np.ndarray | Array, "*rows n"],
    solver: Callable,
    noise: Float[Array, "b h w c"] | None = None,
    x0: Float[Array, "b h w c"] | None = None,
    mask: Float[Array, "b h w 1"] | None = None,
    preview: Preview | None = None,
    to_rgb: Callable[[Array], Array] = linear_rgb,
    spread: float = 1.0,
    steps: solvers.Integer | None = None,
    **options,
) -> tuple[Float[Array, "*n b h w c"], PyTree]:
    """Latents (b, *shape), from the solver's steps down the times of `grid`, and the
    state in which the last step left a velocity that is Remembering.

    Noise is drawn with a key for each row, so that a picture does not depend on its
    batch, or is `noise`; stochastic solvers need the keys in any case. With `x0`,
    sampling starts at x0 noised to grid[0]; where `mask` is 0, x0 noised to t replaces
    x after each step. preview(step, t, to_rgb(x)) is called on the host after each
    step. A solver with a trajectory returns all n latents. `spread` is the std of x at
    grid[0], for formulations that do not start at pure noise. `steps`, which may be
    traced, is how many steps are taken. With a grid (b, n) and steps (b,) each row has
    times of its own. Other `options` are guided()'s.
    """
    # Noise is float32 whatever the model computes in: the solver's state x is float32.
    draw = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))
    if noise is None:
        noise = draw(keys)
    guided = guidance.guided(velocity, cond, uncond, grid=grid, **options)
    # The same noise at every t: the kept area follows one straight path down to x0.
    at = lambda t: RF.interpolate(x0, noise, jnp.full(len(noise), _flat(t)))

    def after(x, t, step):
        if mask is not None:
            # Replaced after each step, as in RePaint without its resampling: the
            # painted area sees a picture that is as noisy as itself.
            x = (1 - mask) * at(t) + mask * x
        if preview is not None:
            # The adaptive solver has a t for each row; the slowest is told.
            # Not ordered: on several devices jax knows no order of callbacks.
            jax.debug.callback(preview, step, jnp.max(t), to_rgb(x))
        return x

    # With x0 the grid may begin below t = 1, at a picture that is noised in part.
    start = spread * noise if x0 is None else at(jnp.asarray(grid)[..., 0])
    solver_options = {"steps": steps}
    if solvers.draws(solver):
        # Fresh noise of step i depends on the picture's key and i alone.
        fold = jax.vmap(jax.random.fold_in, (0, None))
        solver_options["draw"] = lambda step: draw(fold(keys, step))
    # With nothing to do between steps the solver is given no function at all.
    after_step = None if mask is None and preview is None else after
    latents = solver(guided, start, grid, after=after_step, **solver_options)
    return latents, guided.final[1] if isinstance(guided, Carried) else None


def _flat(t: Array) -> Array:
    """The times of rows, (b, 1, ...), as (b,); or the one of all."""
    return t if jnp.ndim(t) == 0 else jnp.ravel(t)
