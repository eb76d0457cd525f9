"""What is minimised: init(key) -> params, loss(params, key, batch, frozen)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sd3_jax import tree
from sd3_jax.diffusion.formulations import Formulation
from sd3_jax.diffusion.losses import flow_loss, loss_at
from sd3_jax.pipelines import prompts
from sd3_jax.pipelines.latents import Autoencoder
from sd3_jax.pipelines.prompts import Conditioning, TextModel


class Objective(NamedTuple):
    """A loss for make_train_step, and the velocity that sampling follows.

    `init(key)` gives boxed params; `loss(params, key, batch, frozen)` a scalar and
    metrics; `loss_at(params, key, batch, t)` the mean error at times t (b,), nothing
    dropped; `encode(params, batch)` the text; `velocity(params)` v(x, t, cond).
    """

    init: Callable[[Array], dict]
    loss: Callable[..., tuple[Array, dict]]
    loss_at: Callable[..., Array]
    encode: Callable[[dict, dict], Conditioning]
    velocity: Callable[[dict], Callable]


def flow_matching(
    denoiser: nn.Module,
    text: TextModel,
    autoencoder: Autoencoder,
    *,
    formulation: Formulation,
    dropout: float,
    example: dict,
    random_positions: bool = False,
) -> Objective:
    """A formulation's regression on latents, the text's encoders dropped one by one.

    `example` is a batch, or its shapes, from which the parameters get theirs. With
    `random_positions` each example lies somewhere on the position table, as in the
    training of SD3.5-medium, not in its middle.
    """

    def init(key):
        batch = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), example)
        denoiser_key, text_key = jax.random.split(key)
        text_params = text.init(text_key, batch)
        cond = text.encode(tree.unbox(text_params), batch)
        x0 = autoencoder.encode(batch, key)
        params = denoiser.init(denoiser_key, x0, jnp.zeros(1), *cond)["params"]
        return {"denoiser": params, "text": text_params}

    def network(params, cond, **options):
        variables = {"params": params["denoiser"]}
        return lambda x, t: denoiser.apply(variables, x, t, *cond, **options)

    def velocity(params, **options):
        return lambda x, t, cond: formulation.velocity(
            network(params, cond, **options)
        )(x, t)

    def encode(params, batch):
        return text.encode(params["text"], batch)

    def loss(params, key, batch, frozen):
        drop_key, flow_key = jax.random.split(key)
        with jax.named_scope("text"):
            cond = encode(params, batch)
            cond = prompts.drop(drop_key, cond, rate=dropout, layout=text.layout)
        with jax.named_scope("autoencoder"):
            x0 = autoencoder.encode(batch, jax.random.fold_in(key, 2))
        where = {}
        if random_positions:
            place_key = jax.random.fold_in(key, 3)
            where["place"] = denoiser.random_place(place_key, x0.shape)
        answer = formulation.answer(network(params, cond, **where))
        density = formulation.density
        with jax.named_scope("loss"):
            value, _ = flow_loss(
                flow_key, answer, x0, density=density, path=formulation
            )
        return value, {}

    def at(params, key, batch, t):
        cond = encode(params, batch)
        answer = formulation.answer(network(params, cond))
        x0 = autoencoder.encode(batch, jax.random.fold_in(key, 2))
        return loss_at(key, answer, x0, t, path=formulation)[0]

    return Objective(init, loss, at, encode, velocity)
