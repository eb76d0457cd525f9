"""ControlNets beside a denoiser: preparing hints, and adding residuals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Float

from sd3_jax.errors import UserError
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.sampling.images.input_images import Pictures
from sd3_jax.sampling.text.prompts import Conditioning
from sd3_jax.weights import components, controlnet_keys

# What is done to a hint's pixels x in [0, 1]. The autoencoder's encoder is then given
# 2 y - 1, so that of canny it sees 255 * 0.5 * x + 0.5, far outside its usual range:
# that is how Stability's net was trained (sd3_infer.py: vae_encode, and diffusers' own
# processor for it). Blur and depth have no step of their own there.
PREPROCESS = {
    "plain": lambda x: x,
    "blur": lambda x: x,
    "canny": lambda x: (255 * 0.5 * x + 0.5 + 1) / 2,
    "depth": lambda x: x,
    # Of a map that is white where it is near; ComfyUI does so for every depth net.
    "inverted": lambda x: 1 - x,
}


# What the unconditional half of a guided batch gets: the conditional half's hint, as in
# diffusers and ComfyUI; a hint of zeros; or no residuals, as in the guess mode of
# diffusers' pipelines for SD1.5.
UNCONDITIONAL = ("same", "zeros", "off")


class ControlBundle(NamedTuple):
    """A ControlNet with its weights and its configuration, which is diffusers'.

    config["control_type"], "blur", "canny" or "depth", is there if its file says so.
    """

    module: ControlNet
    variables: dict
    config: dict

    def __repr__(self) -> str:
        kind = self.config.get(
            controlnet_keys.CONTROL_TYPE, "its hint's kind is not said"
        )
        return f"ControlBundle(depth {self.module.depth}, {kind})"


class ControlInput(NamedTuple):
    """A ControlNet and the image that it follows.

    `image`, one or a batch (sampling/images/input_images.py), is the output of the
    net's detector, or latents of it. The net acts with weight `scale` from `start`
    to `stop`, both shares of the steps. An inpainting net repaints the image where
    `mask` is 1.
    `preprocess` is "plain", "blur", "canny", "depth" or "inverted"; the default is the
    control type in the net's file, or "plain".

    `unconditional` is the hint of guidance's unconditional half: "same", "zeros" (zero
    latents), "off" (no residuals), or an image of its own.
    """

    net: ControlBundle
    image: Pictures
    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    mask: Pictures | None = None
    preprocess: str | None = None
    unconditional: Pictures | str = "same"


class Control(NamedTuple):
    """A ControlNet with its arrays, which may differ from call to call.

    `hint` is the condition as scaled latents, (b, h, w, 16) or more channels. Residuals
    are multiplied by `scale` and are 0 for t outside of `window`. Those of guidance's
    unconditional half have `uncond_hint` and `uncond_scale`, None for the same.
    """

    net: ControlNet
    variables: Any
    hint: Float[Array, "b h w c"]
    scale: Float[Array, ""]
    window: tuple[Float[Array, ""], Float[Array, ""]]
    uncond_hint: Float[Array, "b h w c"] | None = None
    uncond_scale: Float[Array, ""] | None = None


def require_fit(
    where: Any, net: ControlNet, config: Mapping, denoiser: MMDiT, theirs: Mapping
) -> None:
    """UserError for a net of another model than the denoiser.

    `config` and `theirs` are diffusers' configurations of the two.
    """
    sizes = {
        "width": (net.width, denoiser.width),
        "patch": (net.patch, denoiser.patch),
        "channels": (config.get("in_channels", 16), denoiser.channels),
    }
    # A single-stream net does not attend to the text, so its width is not compared.
    shared = ("pooled_projection_dim",) + ("joint_attention_dim",) * net.joint
    for name in shared:
        sizes[name] = config.get(name), theirs.get(name)
    wrong = [f"{k} {a} against {b}" for k, (a, b) in sizes.items() if a != b]
    # Residuals are spread over the denoiser's layers, so fewer are fine and more are
    # not.
    if net.depth > denoiser.depth:
        wrong.append(f"{net.depth} layers against {denoiser.depth}")
    if wrong:
        kind = "joint" if net.joint else "single-stream (SD3.5-large's)"
        raise UserError(
            f"{where}: a {kind} ControlNet that does not fit this denoiser,"
            f" {components.released_name(theirs)}: {', '.join(wrong)}; use a ControlNet"
            " for the same model"
        )


def require_equal_depths(nets: Sequence[ControlNet]) -> None:
    """UserError for nets of unlike depths, which cannot act together."""
    depths = sorted({net.depth for net in nets})
    # Their residuals are summed before the denoiser spreads them over its layers.
    if len(depths) > 1:
        raise UserError(
            f"ControlNets of {', '.join(map(str, depths))} layers together: all must"
            " have the same number, because their residuals are added layer by layer"
        )


def controlled(
    denoiser: Callable[..., Array], controls: Sequence[Control], **kwargs
) -> Callable[[Array, Array, Conditioning], Array]:
    """velocity(x, t, cond): `denoiser(x, t, *cond, residuals=...)` with all controls.

    Their residuals are added up, so they must be of equally many blocks.
    """
    require_equal_depths([control.net for control in controls])

    def velocity(x, t, cond):
        if not controls:
            return denoiser(x, t, *cond, **kwargs)
        return denoiser(
            x, t, *cond, residuals=residuals(controls, x, t, cond), **kwargs
        )

    return velocity


def residuals(
    controls: Sequence[Control],
    x: Float[Array, "b h w c"],
    t: Float[Array, " b"],
    cond: Conditioning,
) -> Float[Array, "r b n d"]:
    """The sum of the residuals of all controls, one for each of r blocks.

    Guidance runs several conditions in a batch, one after the other, the unconditional
    one first: the hints are repeated for them.
    """
    # Each is a stack over blocks, which the denoiser spreads over its own.
    return sum(_of_control(control, x, t, cond) for control in controls)


def _of_control(control: Control, x, t, cond):
    hint, scale = _by_halves(control, len(x))
    # Some nets were trained with a pooled text of zeros.
    pooled = jnp.zeros_like(cond.pooled) if control.net.zero_pooled else cond.pooled

    def run():
        args = (x, t, cond.context, pooled, hint)
        return control.net.apply(control.variables, *args, scale=scale)

    low, high = control.window
    # All rows are at the same t, so one predicate decides; lax.cond then skips the
    # net's FLOPs outside the window, which jnp.where would not.
    open_ = (low <= t[0]) & (t[0] <= high)
    # eval_shape gives the residuals' shapes without adding the net to the program.
    none = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), jax.eval_shape(run))
    return jax.lax.cond(open_, run, lambda: none)


def _by_halves(control: Control, rows: int) -> tuple[Array, Array]:
    """The hint (rows, h, w, c), and the scale of all rows or of each, (rows, 1, 1)."""
    # Guidance doubles the batch and the hint is given once: (b, …) → (times * b, …).
    b, scale = len(control.hint), control.scale
    times = rows // b
    hint = jnp.tile(control.hint, (times, 1, 1, 1))
    if times == 1:  # no guidance, or a pass of the conditional half alone
        return hint, scale
    if control.uncond_hint is not None:
        hint = jnp.concatenate([control.uncond_hint, hint[b:]])
    if control.uncond_scale is not None:
        scales = [control.uncond_scale] * b + [scale] * (rows - b)
        scale = jnp.stack(scales)[:, None, None]  # beside residuals (r, rows, n, d)
    return hint, scale


def acting_nets(
    nets: Sequence[nn.Module], controls: Sequence[tuple], adapted: dict | None
) -> list[Control]:
    """The controls of a program; `adapted` are the denoiser's variables if they are."""
    # The nets are static and their arrays traced, so they arrive as two arguments.
    acting = [Control(net, *rest) for net, rest in zip(nets, controls)]
    return acting if adapted is None else [_lent(x, adapted) for x in acting]


def _lent(control: Control, variables: dict) -> Control:
    """A net that borrows the denoiser's embedding of patches, with its adapters."""
    if not control.net.borrowed:
        return control
    lent = {"patch_embed": variables["params"]["patch_embed"]}
    params = control.variables["params"] | lent
    return control._replace(variables=control.variables | {"params": params})
