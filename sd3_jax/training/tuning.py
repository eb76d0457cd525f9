"""What of a model trains, and what of it does not: full weights, or a LoRA."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from sd3_jax.training import lora
from sd3_jax.training.objectives import Objective
from sd3_jax.training.preference import preference_loss


class Tuning(NamedTuple):
    """`init(key)` gives what trains, `whole(params, frozen)` the model's parameters.

    `frozen` is the start, as `kept(start)` leaves it; `loss` is make_train_step's.
    """

    init: Callable[[Array], dict]
    kept: Callable[[dict], dict]
    start: Callable[..., dict]
    whole: Callable[[dict, dict], dict]
    loss: Callable[..., tuple[Array, dict]]


def plain(objective: Objective) -> Tuning:
    """Everything trains, from noise."""
    return Tuning(
        init=objective.init,
        kept=lambda start: {},
        start=lambda key, start: objective.init(key),
        whole=lambda params, frozen: params,
        loss=objective.loss,
    )


def full(objective: Objective, *, text: bool, reference: bool) -> Tuning:
    """All weights train, from those of the start; of a tower of text only if `text`.

    `reference` keeps a frozen copy of the start, as DPO wants.
    """
    trained = ("denoiser", "text") if text else ("denoiser",)
    some = lambda tree: {name: tree[name] for name in trained}

    def whole(params, frozen):
        return {k: v for k, v in frozen.items() if k != "reference"} | params

    def kept(start):
        rest = {k: v for k, v in start.items() if k not in trained}
        return rest | ({"reference": start} if reference else {})

    init = lambda key: some(objective.init(key))
    start = lambda key, start: some(start)
    return Tuning(init, kept, start, whole, loss_of(objective, whole))


def low_rank(objective: Objective, *, rank: int, alpha: float, targets: str) -> Tuning:
    """A LoRA on the denoiser's linear maps trains, beside weights that do not."""

    def init(key):
        boxed = objective.init(key)["denoiser"]
        return {"denoiser": lora.init(key, boxed, rank=rank, targets=targets)}

    def whole(params, frozen):
        made = lora.attach(frozen["denoiser"], params["denoiser"], alpha=alpha)
        return {**frozen, "denoiser": made}

    return Tuning(
        init=init,
        kept=lambda start: start,
        start=lambda key, start: init(key),
        whole=whole,
        loss=loss_of(objective, whole),
    )


def loss_of(objective: Objective, whole: Callable) -> Callable:
    def loss(params, key, batch, frozen):
        return objective.loss(whole(params, frozen), key, batch, frozen)

    return loss


def preferring(tuning: Tuning, objective: Objective, *, beta: float, weight: str):
    """The same weights train, by DPO: batches have chosen and rejected pictures, and
    the start is the reference."""

    def loss(params, key, batch, frozen):
        return objective.prefer(
            tuning.whole(params, frozen),
            frozen.get("reference", frozen),
            key,
            batch,
            loss=partial(preference_loss, beta=beta, weight=weight),
        )

    return tuning._replace(loss=loss)


def preserving(
    tuning: Tuning, objective: Objective, *, weight: float, last: int
) -> Tuning:
    """DreamBooth's prior preservation (Ruiz et al. 2022, eq 2): batches have "set", and
    of number `last`, the class's pictures, the loss counts `weight` times."""

    def loss(params, key, batch, frozen):
        batch = dict(batch)
        of = batch.pop("set")
        error = objective.errors(tuning.whole(params, frozen), key, batch)
        mean = lambda mine: (error * mine).sum() / jnp.maximum(mine.sum(), 1)
        prior = (of == last).astype(error.dtype)
        own, classes = mean(1 - prior), mean(prior)
        return own + weight * classes, {"instance": own, "prior": classes}

    return tuning._replace(loss=loss)
