"""The compiled programs of one evaluation: a velocity, and ControlNets' residuals."""

import functools

import jax
from jax import Array

from sd3_jax.params import adapters
from sd3_jax.sampling.control import acting_nets
from sd3_jax.sampling.control import residuals as residuals_of
from sd3_jax.sampling.text.prompts import Conditioning


# At module level and not in a method: jit's cache is by function, and so is shared by
# all bundles with equal modules.
@functools.partial(jax.jit, static_argnames=("denoiser", "skip", "nets"))
def velocity(
    denoiser,
    variables,
    x,
    t,
    context,
    pooled,
    *,
    skip=(),
    nets=(),
    controls=(),
    residuals=None,
) -> Array:
    """v, with the sum of `residuals` and those of the nets."""
    args = x, t, context, pooled
    parts = [] if residuals is None else [residuals]
    if nets:
        parts.append(control_residuals(nets, controls, variables, *args))
    variables = adapters.attached(variables)
    options = {"residuals": sum(parts)} if parts else {}
    return denoiser.apply(variables, *args, skip=skip, **options)


@functools.partial(jax.jit, static_argnames=("nets",))
def control_residuals(nets, controls, variables, x, t, context, pooled) -> Array:
    """Residuals (r, b, n, d) of all nets; `controls` are as in `sample`.

    `variables` are the denoiser's, of which a net may borrow.
    """
    adapted = isinstance(variables, adapters.Adapted)
    lender = adapters.attached(variables) if adapted else None
    acting = acting_nets(nets, controls, lender)
    return residuals_of(acting, x, t, Conditioning(context, pooled))
