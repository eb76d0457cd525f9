"""The exponential moving average of parameters (SD3 paper, appendix B.3)."""

import jax
import jax.numpy as jnp
from jax import Array


def moving_average(ema, params, step: Array, decay: float, every: int):
    """ema += (1 - decay) (params - ema), once every `every` steps.

    Early on the decay is (1 + n) / (10 + n) at the n-th time, so that a short run's
    average does not remember its initialisation. Before step `every` it follows at each
    step: otherwise a shorter run would export the weights that it began with.
    """
    early = step < every
    # float32: the decay lies near 1, where bfloat16 has no numbers but 1 and 0.996.
    n = jnp.where(early, step, step // every).astype(jnp.float32)
    # The ramp of TensorFlow's ExponentialMovingAverage with `num_updates`.
    rate = 1 - jnp.minimum(decay, (1 + n) / (10 + n))
    follow = lambda ema: jax.tree.map(lambda e, p: e + rate * (p - e), ema, params)
    # A branch, so that on the other steps nothing of it is read or written.
    return jax.lax.cond(early | (step % every == 0), follow, lambda ema: ema, ema)
