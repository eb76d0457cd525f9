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
    prepare_batch: Callable[[dict], dict] = lambda batch: batch,
) -> Callable:
    """step(state, key, batch, frozen) -> (state, metrics), for
    loss(params, key, batch, frozen) -> (scalar, metrics of scalars).

    The key is the run's, the same at every step. Where loss or gradient is not finite
    the step counts but changes nothing else. `prepare_batch` gets the whole batch,
    before it is cut into `accumulate` parts. A schedule-free optimizer has an average
    of its own, and ema_decay is not used.
    """
    # On a mesh the weights' gradients arrive reduce-scattered, each from its layer:
    # models/sharded_linear.py.
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, key: Array, batch: dict, frozen: dict):
        # The step's own key comes from its number. No key is carried from step to step,
        # so a resumed run draws what the unbroken one would have drawn.
        key, batch = jax.random.fold_in(key, state.step), prepare_batch(batch)
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

        # Before clipping, which is the optimizer's: clipped, every large norm is alike.
        with jax.named_scope("grad_norm"):
            norm = optax.tree.norm(grads)
        # On the device and before the update: one NaN would stay in Adam's moments for
        # good, and clipping by norm turns one infinity into NaN.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        # A branch, which updates in place. jnp.where takes four times as long on a CPU,
        # where XLA has no fusion of several outputs.
        old = state.params, state.ema, state.opt_state
        new = jax.lax.cond(finite, update, lambda *old: old, *old)
        metrics = {"loss": value, "grad_norm": norm, **metrics}
        return TrainState(now, *new), metrics

    def accumulated(params, key, batch, frozen):
        """The mean over `accumulate` parts of the batch, one after another."""

        def part(total, i_rows):  # the body of the scan: one part, added to the sum
            i, rows = i_rows
            (value, metrics), grads = gradient(
                params, jax.random.fold_in(key, i), rows, frozen
            )
            return jax.tree.map(jnp.add, total, (value, metrics, grads)), None

        # Row r goes to part r % accumulate, which leaves every row on its device.
        rows = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        # The scan's first sum is zeros of the shapes that the gradient will have.
        (value, metrics), grads = jax.eval_shape(
            gradient, params, key, jax.tree.map(lambda x: x[0], rows), frozen
        )
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (value, metrics, grads)
        )
        # A scan, so that the activations of one part are freed before the next.
        total, _ = jax.lax.scan(part, zeros, (jnp.arange(accumulate), rows))
        return jax.tree.map(lambda x: x / accumulate, total)

    return step
