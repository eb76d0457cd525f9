"""AdamW and Muon with warm-up, decay of the kernels only, and clipping by norm."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon


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
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and its learning rate over the steps.

    `schedule` is constant, cosine or linear, to a fiftieth of `lr` at `steps`, after
    `warmup` steps from zero. `clip` is the largest global norm of a gradient, 0 none.
    """
    shape = SCHEDULES[schedule](warmup, steps)
    rate = lambda step: lr * shape(step)
    adamw = dict(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    if name == "adamw":
        tx = optax.adamw(rate, mask=kernels, **adamw)
    else:
        tx = _muon(rate, lambda step: muon_lr * shape(step), **adamw)
    if clip:
        tx = optax.chain(optax.clip_by_global_norm(clip), tx)
    return tx, rate


def constant(warmup, steps):
    if warmup == 0:  # optax takes no steps to mean that it never starts
        return optax.constant_schedule(1.0)
    return optax.linear_schedule(0.0, 1.0, warmup)


def cosine(warmup, steps):
    after = optax.cosine_decay_schedule(1.0, max(1, steps - warmup), 0.02)
    return optax.join_schedules([constant(warmup, steps), after], [warmup])


def linear(warmup, steps):
    after = optax.linear_schedule(1.0, 0.02, max(1, steps - warmup))
    return optax.join_schedules([constant(warmup, steps), after], [warmup])


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear}


def kernels(params):
    """Which leaves decay: matrices and embeddings, no bias, scale or table."""
    decays = ("kernel", "embedding")
    return jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key in decays, params)


def _muon(rate, muon_rate, *, b1, b2, eps, weight_decay):
    """Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for the rest."""
    return muon(
        muon_rate,
        beta=0.95,
        weight_decay=weight_decay,
        weight_decay_mask=kernels,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        adam_weight_decay=weight_decay,
        adam_learning_rate=rate,
        muon_weight_dimension_numbers=matrices,
    )


PLAIN = ("fc1", "fc2", "wo", "skip", "proj_in", "proj_out")  # of a block


def matrices(params):
    """The axes that Muon makes orthogonal, None for what AdamW takes.

    Inside a scanned stack the first axis counts layers; q, k and v are three matrices.
    adaLN, convolutions, the embeddings and the last layer are left to AdamW, as is the
    custom.
    """

    def axes(path, _):
        names = [k.key for k in path]
        layer, i = names[-2], int(any(name.endswith("blocks") for name in names))
        if names[-1] != "kernel":
            return None
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
