"""ControlNets beside a denoiser: their residuals, while their windows are open."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from sd3_jax.models.controlnet import ControlNet
from sd3_jax.pipelines.prompts import Conditioning


class Control(NamedTuple):
    """One ControlNet at work; the arrays may differ from call to call.

    `hint` is the condition as scaled latents, (b, h, w, 16) or more channels; it acts
    for t in `window`, times `scale`. `pooled` 0 where the net was trained without.
    """

    net: ControlNet
    variables: Any
    hint: Float[Array, "b h w c"]
    scale: Float[Array, ""]
    window: tuple[Float[Array, ""], Float[Array, ""]]


def controlled(
    denoiser: Callable[..., Array], controls: Sequence[Control], **kwargs
) -> Callable[[Array, Array, Conditioning], Array]:
    """velocity(x, t, cond): `denoiser(x, t, *cond, residuals=...)` with all controls.

    Their residuals are added up, so they must be of equally many blocks. Guidance runs
    several conditions in a batch, one after the other: the hints are repeated for them.
    """
    counts = sorted({control.net.depth for control in controls})
    if len(counts) > 1:
        raise ValueError(f"ControlNets of {counts} blocks: wanted equally many in each")

    def velocity(x, t, cond):
        if not controls:
            return denoiser(x, t, *cond, **kwargs)
        parts = [_residuals(control, x, t, cond) for control in controls]
        return denoiser(x, t, *cond, residuals=sum(parts), **kwargs)

    return velocity


def _residuals(control: Control, x, t, cond):
    times = x.shape[0] // control.hint.shape[0]
    hint = jnp.tile(control.hint, (times, 1, 1, 1))
    pooled = jnp.zeros_like(cond.pooled) if control.net.zero_pooled else cond.pooled

    def run():
        args = (x, t, cond.context, pooled, hint)
        return control.net.apply(control.variables, *args, scale=control.scale)

    low, high = control.window
    open_ = (low <= t[0]) & (t[0] <= high)
    none = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), jax.eval_shape(run))
    return jax.lax.cond(open_, run, lambda: none)
