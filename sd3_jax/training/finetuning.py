"""Which weights of a model train, all or a LoRA, and which stay frozen."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from sd3_jax.params import lora
from sd3_jax.training.dpo import preference_loss
from sd3_jax.training.objectives import Objective

SETS = ("instance", "prior")  # DreamBooth's losses, NaN of a set that a batch lacks


class Tuning(NamedTuple):
    """A choice of what trains; `start` are the weights to begin with.

    init(key): the trained params, boxed.
    frozen_part(start): the weights that the loss needs and that do not train.
    start(key, start): the first trained params.
    full_params(params, frozen): the model's parameters.
    loss, prepare_batch: for make_train_step.
    """

    init: Callable[[Array], dict]
    frozen_part: Callable[[dict], dict]
    start: Callable[..., dict]
    full_params: Callable[[dict, dict], dict]
    loss: Callable[..., tuple[Array, dict]]
    prepare_batch: Callable[[dict], dict] = lambda batch: batch


def plain(objective: Objective) -> Tuning:
    """Everything trains, from noise."""
    return Tuning(
        init=objective.init,
        frozen_part=lambda start: {},
        start=lambda key, start: objective.init(key),
        full_params=lambda params, frozen: params,
        loss=objective.loss,
    )


def full(objective: Objective, *, text: bool, reference: bool) -> Tuning:
    """All weights train, from those of the start; the text tower only if `text`.

    `reference` keeps a frozen copy of the start, which DPO compares with.
    """
    trained = ("denoiser", "text") if text else ("denoiser",)
    trained_part = lambda tree: {name: tree[name] for name in trained}

    def full_params(params, frozen):
        return {k: v for k, v in frozen.items() if k != "reference"} | params

    def frozen_part(start):
        rest = {k: v for k, v in start.items() if k not in trained}
        return rest | ({"reference": start} if reference else {})

    init = lambda key: trained_part(objective.init(key))
    start = lambda key, start: trained_part(start)
    return Tuning(
        init, frozen_part, start, full_params, loss_of(objective, full_params)
    )


def low_rank(objective: Objective, *, rank: int, alpha: float, targets: str) -> Tuning:
    """A LoRA on the denoiser's linear maps trains, beside weights that do not."""

    def init(key):
        # For shapes and axis names only: under jit nothing of the base is drawn.
        boxed = objective.init(key)["denoiser"]
        return {"denoiser": lora.init(key, boxed, rank=rank, targets=targets)}

    def full_params(params, frozen):
        # Not merged: the base stays as it is, and each linear map adds its two factors.
        denoiser = lora.attach(frozen["denoiser"], params["denoiser"], alpha=alpha)
        return {**frozen, "denoiser": denoiser}

    return Tuning(
        init=init,
        frozen_part=lambda start: start,
        start=lambda key, start: init(key),
        full_params=full_params,
        loss=loss_of(objective, full_params),
    )


def loss_of(objective: Objective, full_params: Callable) -> Callable:
    """The objective's loss as a function of what trains: gradients stop at `frozen`."""

    def loss(params, key, batch, frozen):
        return objective.loss(full_params(params, frozen), key, batch, frozen)

    return loss


def preferring(tuning: Tuning, objective: Objective, *, beta: float, weight: str):
    """The same weights train, by DPO: batches have chosen and rejected pictures, and
    the start is the reference."""

    def loss(params, key, batch, frozen):
        return objective.prefer(
            tuning.full_params(params, frozen),
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
    of number `last`, the class's pictures, the loss counts `weight` times.

    Each set's mean is over its examples in the whole batch, of which a part may have
    none. The metric of a set that the whole batch lacks is NaN.
    """

    # Shares are of the whole batch, before it is cut for accumulation: the mean over
    # parts then equals the mean over the batch.
    def prepare_batch(batch):
        prior = (batch["set"] == last).mean(dtype=jnp.float32)
        shares = jnp.stack([1 - prior, prior])
        return batch | {"shares": jnp.broadcast_to(shares, (len(batch["set"]), 2))}

    def loss(params, key, batch, frozen):
        batch = dict(batch if "shares" in batch else prepare_batch(batch))
        prior, shares = batch.pop("set") == last, batch.pop("shares")[0]
        error = objective.errors(tuning.full_params(params, frozen), key, batch)

        def mean(in_set, share):
            """This part's sum, scaled so that the mean over parts is the set's mean."""
            total = jnp.where(in_set, error, 0).sum()
            # No example of this set: 0 / 1, since 0 / 0 would make the gradient NaN.
            return total / jnp.where(share > 0, share * len(error), 1)

        instance, classes = mean(~prior, shares[0]), mean(prior, shares[1])
        present = lambda value, share: jnp.where(share > 0, value, jnp.nan)
        metrics = map(present, (instance, classes), shares)
        return instance + weight * classes, dict(zip(SETS, metrics))

    return tuning._replace(loss=loss, prepare_batch=prepare_batch)
