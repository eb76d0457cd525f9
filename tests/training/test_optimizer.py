"""Every optimizer: what decays, its state, and going on from a checkpoint."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import digits
from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.checkpoints.manager import Checkpoints
from sd3_jax.checkpoints.restoring import describe_leaves
from sd3_jax.config.schema.training_schema import OPTIMIZERS
from sd3_jax.distributed import sharding
from sd3_jax.training import optimizer
from sd3_jax.training.state import abstract_state, init_state
from sd3_jax.training.step import make_train_step

OPTIM = dict(
    lr=1e-2, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip=1.0,
    schedule="constant", warmup=0, muon_lr=2e-2, steps=100,
)  # fmt: skip
every = pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
with_moment = pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor"])


def boxed(width=2):
    """A model with each kind of leaf, and a LoRA."""
    axes = {2: ("embed", None), 1: (None,), 3: ("layers", "embed", None)}
    leaf = lambda *shape: nn.LogicallyPartitioned(jnp.ones(shape), axes[len(shape)])
    w = width
    return {
        "patch_embed": {"kernel": leaf(w, 2 * w), "bias": leaf(w)},
        "blocks": {
            "mlp": {"fc1": {"kernel": leaf(2, w, 2 * w), "bias": leaf(2, w, 1)}}
        },
        "lora": {"fc1": {"a": leaf(2, w, 2), "b": leaf(2, w, 2)}},
        "text": {"embedding": leaf(w, w), "relative_bias": leaf(w, w)},
        "norm": {"scale": leaf(w)},
    }


def named(tree_):
    leaves = jax.tree_util.tree_leaves_with_path(tree_)
    return {"/".join(tree.names(path)): np.asarray(x) for path, x in leaves}


def test_the_config_allows_these_and_no_others():
    assert set(optimizer.OPTIMIZERS) == set(OPTIMIZERS)


@every
def test_without_a_gradient_only_matrices_decay_by_rate_times_decay(name):
    params = tree.unbox(boxed())
    tx, rate = optimizer.make(name=name, **OPTIM)
    updates = jax.jit(
        lambda params: tx.update(
            jax.tree.map(jnp.zeros_like, params), tx.init(params), params
        )[0]
    )(params)
    decayed = float(rate(0)) * 0.1
    if name == "prodigy":  # its own estimate, which starts here
        decayed *= 1e-6
    for leaf, update in named(updates).items():
        wanted = -decayed if leaf.endswith(("kernel", "embedding", "a", "b")) else 0
        wanted *= 2 if name == "muon" and leaf == "blocks/mlp/fc1/kernel" else 1
        # The iterates of a schedule-free optimizer come out of sums that round.
        exact = name != "schedule_free"
        np.testing.assert_allclose(
            update, wanted, rtol=1e-5, atol=0 if exact else 2e-7, err_msg=leaf
        )


def quadratic(params, key, batch, frozen):
    return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(params)), {}


def stepper(name, **options):
    tx, _ = optimizer.make(**OPTIM | dict(name=name, warmup=1) | options)
    return tx, jax.jit(make_train_step(quadratic, tx, ema_decay=0.9))


@every
def test_it_goes_down_and_goes_on_from_a_checkpoint_to_the_last_bit(name, tmp_path):
    key, lr = jax.random.key(0), 1.0 if name == "prodigy" else 1e-2
    tx, step = stepper(name, lr=lr)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(key, lambda _: boxed(), tx, mesh)
    state, losses = jax.jit(lambda key: init_state(key, lambda _: boxed(), tx))(key), []
    for n in range(6):
        if n == 3:
            with Checkpoints(tmp_path, every=1, keep=1, keep_every=100) as checkpoints:
                checkpoints.save(3, state, {"next_step": 3}, {}, force=True)
                checkpoints.wait()
                restored, *_ = checkpoints.restore(abstract)
        state, metrics = step(state, key, {}, {})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()
    for _ in range(3):
        restored, _ = step(restored, key, {}, {})
    chex.assert_trees_all_equal(restored, state)
    if name == "schedule_free":  # its own average is what is evaluated
        inner = state.opt_state[1]
        x = optax.contrib.schedule_free_eval_params(inner, state.params)
        chex.assert_trees_all_close(state.ema, x, rtol=1e-6)
        assert not np.array_equal(*(jax.tree.leaves(s)[0] for s in (x, state.params)))


@every
def test_state_of_a_parameters_size_lies_as_the_parameter(name):
    mesh = sharding.make_mesh(fsdp=8)
    tx, _ = optimizer.make(name=name, **OPTIM)
    init = lambda _: {"blocks": boxed(width=128)}
    state = abstract_state(jax.eval_shape(lambda: jax.random.key(0)), init, tx, mesh)
    params = jax.tree_util.tree_leaves_with_path(state.params)
    whole = {tree.names(path): (x.shape, x.sharding.spec) for path, x in params}
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state):
        where = tree.names(path)
        own = next((y for k, y in whole.items() if where[-len(k) :] == k), ((), None))
        if x.shape == own[0] != ():
            assert x.sharding.spec == own[1], where
        elif where[-1] == "kernel" and "v_row" in where and x.size > 1:
            assert x.shape[-1] == 128 and x.sharding.spec[-1] == "fsdp", where
        else:
            assert x.size <= 512, where  # a column's moments, counters


def test_adafactor_keeps_rows_and_columns_of_matrices():
    params = {"kernel": jnp.ones((3, 128, 256)), "bias": jnp.ones(256)}
    size = {}
    for name in "adamw", "adafactor":
        tx, _ = optimizer.make(name=name, **OPTIM | dict(b1=0.0))
        size[name] = tree.count(jax.eval_shape(tx.init, params))
    assert size["adafactor"] < size["adamw"] / 100


@with_moment
def test_the_first_moment_may_be_bfloat16(name):
    params = tree.unbox(boxed())
    tx, _ = optimizer.make(name=name, mu_dtype="bfloat16", **OPTIM)
    dtypes = [
        {str(x.dtype) for x in jax.tree.leaves(state) if x.ndim and x.size > 1}
        for state in jax.eval_shape(
            lambda p: (tx.init(p), tx.update(p, tx.init(p), p)[1]), params
        )
    ]
    assert all("bfloat16" in found for found in dtypes) and dtypes[0] == dtypes[1]
    bits = [
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(
                jax.eval_shape(
                    optimizer.make(name=name, mu_dtype=dtype, **OPTIM)[0].init, params
                )
            )
        )
        for dtype in ("float32", "bfloat16")
    ]
    assert bits[0] - bits[1] == 2 * tree.count(params)


def test_muons_other_leaves_have_plain_adam():
    """Two gradients of opposite sign tell Nesterov's moment from Adam's."""
    params = tree.unbox(boxed())
    updates = {}
    for name in "adamw", "muon":
        tx, _ = optimizer.make(name=name, **OPTIM)

        def two_steps(params, tx=tx):
            _, state = tx.update(params, tx.init(params), params)
            return tx.update(jax.tree.map(jnp.negative, params), state, params)[0]

        updates[name] = jax.jit(two_steps)(params)
    for leaf in "patch_embed", "lora", "text", "norm":
        chex.assert_trees_all_equal(updates["muon"][leaf], updates["adamw"][leaf])


def test_what_muon_leaves_of_the_digits_model_is_what_the_docs_say():
    init = model_parts.build_parts(digits.get_config()).objective.init
    shapes = tree.unbox(jax.eval_shape(init, jax.random.key(0)))
    labels = jax.tree_util.tree_leaves_with_path(optimizer._muon_labels(shapes))
    left = {
        tree.names(p)[:-1] for p, x in labels if x == "adam" and p[-1].key == "kernel"
    }
    inside = {names for names in left if any(x.endswith("block") for x in names[:-1])}
    inside |= {names for names in left if "blocks" in names}
    adaln = {names for names in inside if "adaln" in names}
    assert inside - adaln == {("text", "encoder", "stack", "blocks", "wo")}
    assert "(`wo`) in the byte tower" in Path("docs/how-to/train.md").read_text()


def test_a_run_with_optaxs_muon_goes_on_with_ours():
    """The same names and shapes of state, which a checkpoint is compared by."""
    shapes = jax.eval_shape(lambda: tree.unbox(boxed()))
    theirs = optax.contrib.muon(
        lambda step: 1.0,
        weight_decay_mask=optimizer.weight_decay_mask,
        adam_learning_rate=lambda step: 1.0,
        muon_weight_dimension_numbers=optimizer.matrices,
    )
    ours, _ = optimizer.make(name="muon", **OPTIM | dict(clip=0.0))
    states = (describe_leaves(jax.eval_shape(tx.init, shapes)) for tx in (theirs, ours))
    assert next(states) == next(states)


@pytest.mark.parametrize("clip", [0.0, float("inf")])
def test_no_clipping(clip):
    params = {"kernel": jnp.zeros((4, 4))}
    tx, _ = optimizer.make(name="lion", **OPTIM | dict(clip=clip))
    grads = {"kernel": jnp.full((4, 4), 100.0)}
    _, state = tx.update(grads, tx.init(params), params)
    moments = [x for x in jax.tree.leaves(state) if x.shape == (4, 4)]
    np.testing.assert_allclose(moments, 0.01 * 100, rtol=1e-5)
