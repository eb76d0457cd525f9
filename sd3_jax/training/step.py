"""One step for every objective: gradients, optimizer, moving average."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from sd3_jax.training.ema import moving_average
from sd3_jax.training.optimizer import averaged_params
from sd3_jax.training.state import TrainState


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    *,
    ema_decay: float,
    ema_every: int = 1,
    accumulate: int = 1,
    prepared: Callable[[dict], dict] = lambda batch: batch,
) -> Callable:
    """step(state, key, batch, frozen) -> (state, metrics), for
    loss(params, key, batch, frozen) -> (scalar, metrics of scalars).

    A step never advances a key: its own is folded in from state.step, so a resumed run
    draws what the unbroken one would have. Where loss or gradient is not finite the
    step counts but changes nothing else: one NaN would poison Adam's moments for good.
    The whole batch goes through `prepared` before it is cut into parts to accumulate.
    The average of a schedule-free optimizer is its own; ema_decay is not used then.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, key: Array, batch: dict, frozen: dict):
        key, batch = jax.random.fold_in(key, state.step), prepared(batch)
        if accumulate == 1:
            (value, metrics), grads = gradient(state.params, key, batch, frozen)
        else:
            value, metrics, grads = accumulated(state.params, key, batch, frozen)
        now = state.step + 1

        def update(params, ema, opt_state):
            with jax.named_scope("optimizer"):
                updates, opt_state = tx.update(grads, opt_state, params)
                params = optax.apply_updates(params, updates)
            with jax.named_scope("ema"):
                average = averaged_params(opt_state, params)
                if average is None:
                    average = moving_average(ema, params, now, ema_decay, ema_every)
            return params, average, opt_state

        with jax.named_scope("grad_norm"):
            norm = optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # A branch, which updates in place: to choose by jnp.where takes a CPU, which
        # has no fusion of several outputs, four times as long.
        old = state.params, state.ema, state.opt_state
        new = jax.lax.cond(finite, update, lambda *old: old, *old)
        metrics = {"loss": value, "grad_norm": norm, **metrics}
        return TrainState(now, *new), metrics

    def accumulated(params, key, batch, frozen):
        """The mean over `accumulate` parts of the batch, one after another."""

        def part(total, i_rows):
            i, rows = i_rows
            (value, metrics), grads = gradient(
                params, jax.random.fold_in(key, i), rows, frozen
            )
            return jax.tree.map(jnp.add, total, (value, metrics, grads)), None

        # Row r goes to part r % accumulate, which leaves every row on its device.
        rows = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        (value, metrics), grads = jax.eval_shape(
            gradient, params, key, jax.tree.map(lambda x: x[0], rows), frozen
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (value, metrics, grads)
        )
        total, _ = jax.lax.scan(part, zeros, (jnp.arange(accumulate), rows))
        return jax.tree.map(lambda x: x / accumulate, total)

    return step
