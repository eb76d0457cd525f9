"""Direct preference optimisation of a flow (Wallace et al. 2023; SD3 paper, app. C)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from sd3_jax.diffusion.paths import Batch, Regression, Times
from sd3_jax.diffusion.timesteps import Density

WEIGHTS = {
    "constant": jnp.ones_like,
    "(1-t)^2": lambda t: jnp.square(1 - t),  # as of errors in the noise
}
Answer = Callable[[Array, Array], Array]


def preference_loss(
    key: Key[Array, ""],
    answer: Answer,
    reference: Answer,
    chosen: Batch,
    rejected: Batch,
    *,
    density: Density,
    path: Regression,
    beta: float,
    weight: str = "constant",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """-E log sigmoid(-beta / 2 w(t) (m(chosen) - m(rejected))), t ~ density.

    m(x) is how much larger the error of answer(xt, t) is than that of `reference`, each
    the mean over x's numbers; t and noise are the same for both pictures. `answer` is
    called once, on `alternate` chosen and rejected pictures. Where it is the reference,
    the loss is ln 2. The metrics are the share of pairs with m(rejected) > m(chosen),
    the mean of beta / 2 w(t) (m(rejected) - m(chosen)), and the errors.
    """
    t_key, noise_key = jax.random.split(key)
    # One t and one noise for both pictures of a pair: their difference in error is then
    # the pictures' alone.
    t = density.sample(t_key, chosen.shape[:1])
    noise = jax.random.normal(noise_key, chosen.shape, jnp.float32)
    x0, pair_t = alternate(chosen, rejected), alternate(t, t)
    noise = alternate(noise, noise)
    xt = path.interpolate(x0, noise, pair_t)
    target = path.target(x0, noise, pair_t)

    def errors(of: Answer) -> tuple[Times, Times]:
        error = jnp.square(of(xt, pair_t) - target)
        error = error.mean(axis=tuple(range(1, x0.ndim))).reshape(-1, 2)
        return error[:, 0], error[:, 1]

    # The reference is a constant: nothing of its pass is kept for a gradient.
    ours, theirs = errors(answer), jax.lax.stop_gradient(errors(reference))
    better, worse = (a - b for a, b in zip(ours, theirs))
    margin = beta / 2 * WEIGHTS[weight](t) * (worse - better)
    metrics = {
        "accuracy": (margin > 0).mean(dtype=jnp.float32),
        "margin": margin.mean(),
        "chosen_error": ours[0].mean(),
        "rejected_error": ours[1].mean(),
    }
    # log_sigmoid, not log(sigmoid): the latter is -inf for a large negative margin.
    return -jax.nn.log_sigmoid(margin).mean(), metrics


def alternate(a: Array, b: Array) -> Array:
    """a's first row, b's, a's second, …: over a mesh each stays where it is."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
