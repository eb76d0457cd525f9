"""What of a model trains, and what of it does not: full weights, or a LoRA."""

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
    """`init(key)` gives what trains, `whole(params, frozen)` the model's parameters.

    `frozen` is the start, as `kept(start)` leaves it; `loss` is make_train_step's, and
    so is `prepared`, which a whole batch goes through before it is cut into parts.
    """

    init: Callable[[Array], dict]
    kept: Callable[[dict], dict]
    start: Callable[..., dict]
    whole: Callable[[dict, dict], dict]
    loss: Callable[..., tuple[Array, dict]]
    prepared: Callable[[dict], dict] = lambda batch: batch


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
    of number `last`, the class's pictures, the loss counts `weight` times.

    Each set's mean is over its examples in the whole batch, of which a part may have
    none. The metric of a set that the whole batch lacks is NaN.
    """

    def prepared(batch):
        prior = (batch["set"] == last).mean(dtype=jnp.float32)
        shares = jnp.stack([1 - prior, prior])
        return batch | {"shares": jnp.broadcast_to(shares, (len(batch["set"]), 2))}

    def loss(params, key, batch, frozen):
        batch = dict(batch if "shares" in batch else prepared(batch))
        prior, shares = batch.pop("set") == last, batch.pop("shares")[0]
        error = objective.errors(tuning.whole(params, frozen), key, batch)

        def mean(mine, share):
            """Times what makes the mean over a batch's parts that over the batch."""
            total = jnp.where(mine, error, 0).sum()
            return total / jnp.where(share > 0, share * len(error), 1)

        instance, classes = mean(~prior, shares[0]), mean(prior, shares[1])
        present = lambda value, share: jnp.where(share > 0, value, jnp.nan)
        metrics = map(present, (instance, classes), shares)
        return instance + weight * classes, dict(zip(SETS, metrics))

    return tuning._replace(loss=loss, prepared=prepared)
