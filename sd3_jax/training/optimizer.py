"""Optimizers by name: warm-up, decay of the matrices only, and clipping by norm."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import (
    MuonDimensionNumbers,
    ProdigyState,
    ScheduleFreeState,
    prodigy,
    scale_by_muon,
    schedule_free,
    schedule_free_eval_params,
)

FACTORED = 64  # Adafactor factors matrices whose sides are at least a head's width


def make(
    *,
    name: str,
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    schedule: str,
    warmup: int,
    steps: int,
    muon_lr: float = 0.02,
    mu_dtype: str = "float32",
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate over the steps.

    `name` is a key of OPTIMIZERS. `schedule` is constant, cosine or linear, to a
    fiftieth of `lr` at `steps`, after `warmup` steps from zero. `clip` is the largest
    global norm of a gradient, 0 or inf none. `mu_dtype` is that of the first moment.
    Decay is decoupled: a step without a gradient multiplies the leaves of
    `weight_decay_mask` by 1 - rate * weight_decay and leaves all others as they are.
    """
    shape = SCHEDULES[schedule](warmup, steps)
    # One schedule for both rates: Muon's is larger, but warms up and decays alike.
    rate = lambda step: lr * shape(step)
    muon_rate = lambda step: muon_lr * shape(step)
    tx = OPTIMIZERS[name](
        Settings(rate, muon_rate, b1, b2, eps, weight_decay, jnp.dtype(mu_dtype))
    )
    if clip:
        # Before the optimizer, so that its moments see the clipped gradient.
        tx = optax.chain(optax.clip_by_global_norm(clip), tx)
    return tx, rate


def constant(warmup, steps):
    if warmup == 0:  # optax would stay at the first value, 0, for ever
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(0.0, 1.0, warmup)


def cosine(warmup, steps):
    after = optax.cosine_decay_schedule(1.0, max(1, steps - warmup), 0.02)
    return optax.join_schedules([constant(warmup, steps), after], [warmup])


def linear(warmup, steps):
    after = optax.linear_schedule(1.0, 0.02, max(1, steps - warmup))
    return optax.join_schedules([constant(warmup, steps), after], [warmup])


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear}
DECAYED = ("kernel", "embedding", "a", "b")  # the last two are a LoRA's matrices


def weight_decay_mask(params):
    """Which leaves decay: matrices and embeddings, no bias, scale or table."""
    # By name, not by rank: a scanned stack gives biases and scales a second axis.
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key in DECAYED, params)


def averaged_params(opt_state: optax.OptState, params) -> dict | None:
    """The parameters that a schedule-free optimizer is evaluated at, None of others."""
    is_schedule_free = lambda x: isinstance(x, ScheduleFreeState)
    # Clipping and partitioning wrap the optimizer's state: look for it at any depth.
    for state in jax.tree.leaves(opt_state, is_leaf=is_schedule_free):
        if is_schedule_free(state):
            return schedule_free_eval_params(state, params)
    return None


class Settings(NamedTuple):
    """Learning rates by step, and the numbers of config.optim."""

    rate: optax.Schedule
    muon_rate: optax.Schedule
    b1: float
    b2: float
    eps: float
    weight_decay: float
    mu_dtype: jnp.dtype


def _decoupled(s: Settings, *scaled, rate: optax.Schedule | None = None):
    """The transformations `scaled`, plus decoupled weight decay, times the rate."""
    return optax.chain(
        *scaled,
        optax.add_decayed_weights(s.weight_decay, weight_decay_mask),
        optax.scale_by_learning_rate(rate or s.rate),
    )


def _adamw(s: Settings):
    return _decoupled(s, optax.scale_by_adam(s.b1, s.b2, s.eps, mu_dtype=s.mu_dtype))


def _lion(s: Settings):
    """Chen et al. 2023: the sign of an interpolated moment."""
    return _decoupled(s, optax.scale_by_lion(s.b1, s.b2, mu_dtype=s.mu_dtype))


def _adafactor(s: Settings):
    """Shazeer & Stern 2018, with a moment and AdamW's meaning of the rate (Zhai et al.
    2021): neither is relative to a parameter's size, of which zero-initialised ones
    have none. `eps` joins the squared gradient, squared; b2 is 1 - step^-0.8."""
    epsilon = max(s.eps**2, 1e-30)  # 1e-30 is the paper's: without it 0 / 0
    scaled = [
        optax.scale_by_factored_rms(min_dim_size_to_factor=FACTORED, epsilon=epsilon),
        optax.clip_by_block_rms(1.0),  # their update clipping, d = 1 (sec. 6)
    ]
    if s.b1:
        scaled += [optax.ema(s.b1, debias=False, accumulator_dtype=s.mu_dtype)]
    return _decoupled(s, *scaled)


def _muon(s: Settings):
    """Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for the rest.

    Not optax.contrib.muon, whose AdamW is Nesterov's and decays biases.
    """
    # 0.95 is Jordan's: b1 belongs to AdamW, for the leaves that Muon does not take.
    orthogonal = scale_by_muon(
        beta=0.95, mu_dtype=s.mu_dtype, weight_dimension_numbers=matrices
    )
    widened = optax.stateless(lambda updates, params: _scale_by_shape(updates))
    matrix = _decoupled(s, orthogonal, widened, rate=s.muon_rate)
    return optax.partition({"muon": matrix, "adam": _adamw(s)}, _muon_labels)


def _muon_labels(params):
    is_axes = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    label = lambda axes: "adam" if axes is None else "muon"
    return jax.tree.map(label, matrices(params), is_leaf=is_axes)


def _scale_by_shape(updates):
    """Times sqrt(max(1, outputs / inputs)), so that one rate does for all shapes."""

    def scale(update, axes):
        size = lambda along: math.prod(update.shape[axis] for axis in along)
        outputs, inputs = size(axes.output_axis), size(axes.reduction_axis)
        return update * math.sqrt(max(1, outputs / inputs))

    return jax.tree.map(scale, updates, matrices(updates))


def _schedule_free(s: Settings):
    """AdamW without its moment, averaged instead (Defazio et al. 2024)."""
    rms = optax.scale_by_rms(s.b2, s.eps, eps_in_sqrt=False, bias_correction=True)
    return schedule_free(_decoupled(s, rms), s.rate, b1=s.b1)


def _prodigy(s: Settings):
    """AdamW that estimates its rate (Mishchenko & Defazio 2023); lr multiplies it.

    optax's decays every leaf, so decay is added here, times the same rate. Without the
    safeguard the first step of a warm-up, whose rate is 0, makes the estimate 0 / 0; so
    does a first step without any gradient, which leaves it as it is here.
    """
    inner = prodigy(s.rate, (s.b1, s.b2), eps=s.eps, safeguard_warmup=True)

    def init(params):
        # Prodigy keeps the initial parameters. Without a copy they would be the same
        # buffers as the params, and both are donated.
        return inner.init(jax.tree.map(jnp.copy, params))

    def update(updates, state: Any, params=None):
        updates, new = inner.update(updates, state, params)
        new = cast(ProdigyState, new)  # optax types every state as a tree of arrays
        undefined = jnp.isnan(new.estim_lr)
        estim_lr = jnp.where(undefined, state.estim_lr, new.estim_lr)
        rate = state.estim_lr * s.rate(state.count)

        def decay(update, param, decays):
            update = jnp.where(undefined, 0, update)
            return update - rate * s.weight_decay * param if decays else update

        updates = jax.tree.map(decay, updates, params, weight_decay_mask(params))
        return updates, new._replace(estim_lr=estim_lr)

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[[Settings], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "adafactor": _adafactor,
    "prodigy": _prodigy,
    "schedule_free": _schedule_free,
}
# Layers of a block whose kernel is one matrix, (inputs, outputs).
PLAIN = ("fc1", "fc2", "wo", "skip", "proj_in", "proj_out")


def matrices(params):
    """The axes that Muon makes orthogonal, None for what AdamW takes.

    Inside a scanned stack the first axis counts layers; q, k and v are three matrices.
    adaLN, convolutions, the embeddings, the last layer and LoRAs are left to AdamW, as
    is the custom. So is `wo` of the byte tower (text/encoder/stack/blocks), whose other
    matrices are Muon's: the digits' published numbers were trained like this.
    """

    def axes(path, _):
        names = [k.key for k in path]
        layer, i = names[-2], int(any(name.endswith("blocks") for name in names))
        if names[-1] != "kernel":
            return None
        # Attention's kernels have axes of their own for q, k, v and for heads.
        if layer in ("to_qkv", "to_kv"):
            return MuonDimensionNumbers((i,), (i + 2, i + 3))
        if layer == "to_out":
            return MuonDimensionNumbers((i, i + 1), (i + 2,))
        if layer == "to_q":
            return MuonDimensionNumbers((i,), (i + 1, i + 2))
        if layer == "wi":
            return MuonDimensionNumbers((i,), (i + 2,))
        if layer in PLAIN and "block" in names[0] + names[1]:
            return MuonDimensionNumbers((i,), (i + 1,))
        return None

    return jax.tree_util.tree_map_with_path(axes, params)
