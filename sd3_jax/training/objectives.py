"""The training objective: init(key) -> params, loss(params, key, batch, frozen)."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from sd3_jax import tree
from sd3_jax.diffusion.carried import Remembering
from sd3_jax.diffusion.formulations import Formulation
from sd3_jax.diffusion.losses import flow_loss, loss_at
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.sampling import cached_network
from sd3_jax.sampling.latents import Autoencoder
from sd3_jax.sampling.text import prompts
from sd3_jax.sampling.text.prompts import Conditioning, TextModel
from sd3_jax.training.dpo import alternate

REJECTED = "rejected_"  # prefix of the fields of a preference's rejected picture


class Objective(NamedTuple):
    """A loss for make_train_step, and the velocity that sampling follows.

    `init(key)` gives boxed params; `loss(params, key, batch, frozen)` a scalar and
    metrics; `errors(params, key, batch)` what the loss is the mean of, (b,);
    `prefer(params, reference, key, batch, loss=)` a loss of preferences, of the answers
    of two sets of params; `loss_at(params, key, batch, t)` the mean error at times t
    (b,), nothing dropped; `encode(params, batch)` the text; `velocity(params)`
    v(x, t, cond), which with a step_cache.Cache as `cache` is Remembering.
    """

    init: Callable[[Array], dict]
    loss: Callable[..., tuple[Array, dict]]
    errors: Callable[..., Array]
    prefer: Callable[..., tuple[Array, dict]]
    loss_at: Callable[..., Array]
    encode: Callable[[dict, dict], Conditioning]
    velocity: Callable[..., Callable | Remembering]


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
        # One example of zeros: parameters depend on shapes, not on the batch size.
        batch = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), example)
        denoiser_key, text_key = jax.random.split(key)
        text_params = text.init(text_key, batch)
        cond = text.encode(tree.unbox(text_params), batch)
        # The key a second time: no parameter depends on the values of x0.
        x0 = autoencoder.encode(batch, key)
        params = denoiser.init(denoiser_key, x0, jnp.zeros(1), *cond)["params"]
        return {"denoiser": params, "text": text_params}

    def variables_of(params):
        variables = {"params": params["denoiser"]}
        if "buffers" in params:  # a released model's table of positions
            variables["buffers"] = params["buffers"]
        return variables

    def network(params, cond, **options):
        variables = variables_of(params)
        # Typed as if it could return variables too, which it does with `mutable`.
        apply = cast(Callable[..., Array], denoiser.apply)
        return lambda x, t: apply(variables, x, t, *cond, **options)

    def velocity(params, *, cache=None, **options):
        if cache is not None:
            return remembering_velocity(params, cache)
        return lambda x, t, cond: formulation.velocity(
            network(params, cond, **options)
        )(x, t)

    def remembering_velocity(params, cache):
        # Samplers offer a cache to an MMDiT alone.
        mmdit = cast(MMDiT, denoiser)
        network = cached_network.remembering(mmdit, variables_of(params), cache)
        wrapped = cached_network.with_state(formulation.velocity, network.function)
        return network._replace(function=wrapped)

    def encode(params, batch):
        return text.encode(params["text"], batch)

    def conditioned(params, key, batch):
        """The encoded text, some of it dropped for classifier-free guidance."""
        # `regressed` splits the same key and takes the other half for the flow.
        drop_key, _ = jax.random.split(key)
        with jax.named_scope("text"):
            cond = encode(params, batch)
            return prompts.drop(drop_key, cond, rate=dropout, layout=text.layout)

    def pictured(key, batch):
        """x0, and its place on the position table where that is drawn."""
        with jax.named_scope("autoencoder"):
            x0 = autoencoder.encode(batch, jax.random.fold_in(key, 2))
        if not random_positions:
            return x0, {}
        place = denoiser.random_place(jax.random.fold_in(key, 3), x0.shape)
        return x0, {"place": place}

    def regressed(params, key, batch):
        _, flow_key = jax.random.split(key)
        cond = conditioned(params, key, batch)
        x0, where = pictured(key, batch)
        answer = formulation.answer(network(params, cond, **where))
        density = formulation.density
        with jax.named_scope("loss"):
            return flow_loss(flow_key, answer, x0, density=density, path=formulation)

    def loss(params, key, batch, frozen):
        return regressed(params, key, batch)[0], {}

    def errors(params, key, batch):
        return regressed(params, key, batch)[1]["error"]

    def prefer(params, reference, key, batch, *, loss):
        _, flow_key = jax.random.split(key)
        better, worse = parted(batch)
        # Chosen and rejected picture with the same key: the same draw of the
        # autoencoder, and the same place on the position table.
        x0, where = zip(*(pictured(key, {**better, **x}) for x in ({}, worse)))
        where = jax.tree.map(alternate, *where)

        def answer(params):
            cond = conditioned(params, key, better)
            cond = jax.tree.map(alternate, cond, cond)
            return formulation.answer(network(params, cond, **where))

        answers, density = (answer(params), answer(reference)), formulation.density
        with jax.named_scope("loss"):
            return loss(flow_key, *answers, *x0, density=density, path=formulation)

    def at(params, key, batch, t):
        cond = encode(params, batch)
        answer = formulation.answer(network(params, cond))
        x0 = autoencoder.encode(batch, jax.random.fold_in(key, 2))
        return loss_at(key, answer, x0, t, path=formulation)[0]

    return Objective(init, loss, errors, prefer, at, encode, velocity)


def parted(batch: dict) -> tuple[dict, dict]:
    """(chosen, rejected): a preference as two batches with the same field names."""
    worse = {k: x for k, x in batch.items() if k.startswith(REJECTED)}
    better = {k: x for k, x in batch.items() if k not in worse}
    return better, {k.removeprefix(REJECTED): x for k, x in worse.items()}
