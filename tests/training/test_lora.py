"""LoRA: what it adapts, where it starts, and that models compute with its sum."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models.clip import ClipText
from sd3_jax.models.denoiser_blocks import Projections
from sd3_jax.models.denoisers import DENOISERS, denoiser_class
from sd3_jax.models.layers import Dense, Mlp, Modulation, modulate
from sd3_jax.models.scan import scanned
from sd3_jax.models.t5 import ByteTower
from sd3_jax.params import lora, parametrization
from sd3_jax.params.lora import kernels, layout
from sd3_jax.params.parametrization import LowRank

SIZES = dict(depth=4, width=32, num_heads=2, dtype=jnp.float32)
ARGS = (jnp.ones((2, 8, 8, 16)), jnp.ones(2), jnp.ones((2, 6, 24)), jnp.ones((2, 12)))
MMDIT = denoiser_class("mmdit")(**SIZES, remat="full")


@pytest.fixture(scope="module")
def boxed():
    return jax.jit(MMDIT.init)(jax.random.key(0), *ARGS)["params"]


def shaken(params, key=7):
    """No leaf zero: adaLN's are at birth, and hide what is behind them."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(treedef, noisy)


@pytest.fixture(scope="module")
def params(boxed):
    return shaken(tree.unbox(boxed))


def random_lora(params, rank=3, targets="", scale=0.3):
    made = tree.unbox(lora.init(jax.random.key(1), params, rank=rank, targets=targets))
    return jax.tree.map(lambda x: scale * x, shaken(made))


# With the fusions that conftest.py does without, adding zeros changes no rounding.
@partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
def velocity(params):
    return MMDIT.apply({"params": params}, *ARGS)


def close(a, b, share):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() <= share * np.std(b)


@pytest.mark.parametrize("name", [*DENOISERS, "bytes", "clip"])
def test_what_it_adapts_is_what_the_dense_layers_are(name):
    model, args = MMDIT, ARGS
    if name == "bytes":
        sizes = dict(words=4, context_dim=24, pooled_dim=12)
        model, args = ByteTower(2, 32, 2, **sizes), (jnp.ones((2, 8), jnp.int32),)
    elif name == "clip":
        model = ClipText(32, 3, 32, 2, 64, 16, "gelu", length=8)
        args = (jnp.ones((2, 8), jnp.int32),)
    elif name == "mmdit":
        model = MMDIT.clone(dual_blocks=1)
    else:
        more = (
            dict(channels=16, multipliers=(1, 2), attended=(0, 1))
            if name == "unet"
            else {}
        )
        model = denoiser_class(name)(**SIZES | {"depth": 3}, **more)
    told = {}

    def listen(call, args, kwargs, context):
        if isinstance(context.module, Dense) and context.method_name == "__call__":
            outputs = np.atleast_1d(context.module.features).size
            told[context.module.path] = len(context.module.axes) - outputs, outputs
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        made = jax.eval_shape(lambda: model.init(jax.random.key(0), *args))["params"]
    found = {
        path: (lies.inputs, kernel.value.ndim - lies.layers - lies.inputs)
        for path, kernel in kernels(made).items()
        for lies in [layout(path, kernel.value.ndim)]
    }
    assert found == told
    for path, kernel in kernels(made).items():
        layers = layout(path, kernel.value.ndim).layers
        assert (kernel.names[0] == "layers") == bool(layers), path


def test_it_starts_as_nothing_to_the_last_bit(params):
    started = tree.unbox(lora.init(jax.random.key(1), params, rank=2, targets=""))
    found = velocity(lora.attach(params, started, alpha=8.0))
    np.testing.assert_array_equal(found, velocity(params))


def test_in_bfloat16_it_starts_as_nothing_to_the_last_bit(params):
    model = MMDIT.clone(dtype=jnp.bfloat16)
    run = jax.jit(lambda p: model.apply({"params": p}, *ARGS))
    started = tree.unbox(lora.init(jax.random.key(1), params, rank=2, targets=""))
    attached = lora.attach(params, started)
    np.testing.assert_array_equal(run(attached), run(params))


def test_attached_is_merged(params):
    adapter = random_lora(params)
    attached = velocity(lora.attach(params, adapter, alpha=6.0, weight=0.5))
    merged = lora.merge(params, adapter, alpha=6.0, weight=0.5)
    assert not any(isinstance(x, LowRank) for x in jax.tree.leaves(merged))
    close(attached, velocity(merged), 1e-5)
    assert np.abs(attached - velocity(params)).max() > 0.1 * np.std(attached)
    chex.assert_trees_all_close(
        lora.merge(merged, adapter, alpha=6.0, weight=-0.5), params, atol=1e-6
    )


def test_several_add_up(params):
    one, two = random_lora(params, 2, "attn"), random_lora(params, 3, "to_qkv|mlp")
    both = lora.attach(lora.attach(params, one, weight=0.7), two, alpha=1.0)
    merged = lora.merge(lora.merge(params, one, weight=0.7), two, alpha=1.0)
    chex.assert_trees_all_close(parametrization.arrays(both), merged, atol=1e-6)
    close(velocity(both), velocity(merged), 1e-5)


@pytest.mark.parametrize("path", ["to_qkv", "to_out", "adaln", "fc2"])
def test_the_sum_is_matrix_by_matrix(params, path):
    """Against plain matrix products, per layer and per map of a fused kernel."""
    adapter = random_lora(params, targets=f"^blocks/image/.*{path}")
    ((place, pair),) = list(_pairs(adapter))
    kernel = params
    for name in place:
        kernel = kernel[name]
    kernel = kernel["kernel"]
    made = lora.merge(params, adapter, alpha=6.0)  # times 6 / 3
    for name in place:
        made = made[name]
    inputs = 2 if path == "to_out" else 1
    for layer in range(len(kernel)):
        delta = np.asarray(made["kernel"][layer] - kernel[layer])
        a, b = pair["a"][layer], pair["b"][layer]
        if path == "to_qkv":
            for i in range(3):
                wanted = 2 * a[:, i] @ b[i].reshape(3, -1)
                got = delta[:, i].reshape(len(a), -1)
                np.testing.assert_allclose(got, wanted, atol=1e-6)
        else:
            rows = np.prod(kernel.shape[1 : 1 + inputs])
            wanted = 2 * a.reshape(rows, 3) @ b.reshape(3, -1)
            np.testing.assert_allclose(delta.reshape(rows, -1), wanted, atol=1e-6)


def _pairs(adapter, path=()):
    if "a" in adapter:
        yield path, adapter
        return
    for name, below in adapter.items():
        yield from _pairs(below, (*path, name))


def test_what_an_adapter_lacks_of_a_map_starts_anew(params):
    """A file with q of the first layer leaves k, v and the other layers zero."""
    new = tree.unbox(lora.init(jax.random.key(1), params, rank=2, targets="image/attn"))
    loaded = jax.tree.map(np.array, shaken(new))
    path = ("blocks", "image", "attn", "to_qkv")
    place = lambda tree_: tree_[path[0]][path[1]][path[2]][path[3]]
    for name, x in place(loaded).items():
        x[1:] = 0
        x[(0, slice(None), slice(1, None)) if name == "a" else (0, slice(1, None))] = 0
    started, fresh = lora.started(new, loaded), place(new)
    qkv = place(started)
    np.testing.assert_array_equal(qkv["a"][0, :, 0], place(loaded)["a"][0, :, 0])
    np.testing.assert_array_equal(qkv["a"][0, :, 1:], fresh["a"][0, :, 1:])
    np.testing.assert_array_equal(qkv["a"][1:], fresh["a"][1:])
    np.testing.assert_array_equal(qkv["b"], place(loaded)["b"])
    out = started["blocks"]["image"]["attn"]["to_out"]
    chex.assert_trees_all_equal(out, loaded["blocks"]["image"]["attn"]["to_out"])


def test_its_axes_are_the_kernels(boxed):
    made = lora.init(jax.random.key(1), boxed, rank=2, targets="attn")
    qkv, out = (made["blocks"]["image"]["attn"][x] for x in ("to_qkv", "to_out"))
    assert qkv["a"].names == ("layers", "embed", None, None)
    assert qkv["b"].names == ("layers", None, None, "heads", None)
    assert out["a"].names == ("layers", "heads", None, None)
    assert out["b"].names == ("layers", None, "embed")
    assert set(made["blocks"]["image"]) == {"attn"}
    deviation = float(jnp.std(qkv["a"].value))
    assert abs(deviation - 1 / 2) < 0.1 and not qkv["b"].value.any()


def test_of_shapes_as_well(boxed):
    shapes = jax.eval_shape(lambda: boxed)
    made = jax.eval_shape(lambda k: lora.init(k, shapes, rank=2), jax.random.key(1))
    wanted = lora.init(jax.random.key(1), boxed, rank=2)
    chex.assert_trees_all_equal_shapes(made, wanted)


class Stack(nn.Module):
    """All kinds of linear maps in a block, under scan and remat."""

    @nn.compact
    def __call__(self, x, c):
        body = lambda block, x, c: (block(x, c), None)
        return scanned(body, 2, remat="full")(StackBlock(name="blocks"), x, c)[0]


class StackBlock(nn.Module):
    @nn.compact
    def __call__(self, x, c):
        modulation = Modulation(2, 32, jnp.float32, name="adaln")(c)
        shift, scale = jnp.unstack(modulation, axis=1)
        attn = Projections(32, 4, False, dtype=jnp.float32, name="attn")
        q, k, v = attn.qkv(modulate(x, shift, scale))
        x = x + attn.project(jnp.sin(q) * k + v)
        return x + Mlp(2, jnp.float32, name="mlp")(x)


@pytest.mark.parametrize(
    "sizes", [dict(data=2, fsdp=4), dict(fsdp=2, context=2, tensor=2)]
)
def test_over_a_mesh_it_is_the_same_with_its_gradient(sizes):
    keys = jax.random.split(jax.random.key(3))
    args = jax.random.normal(keys[0], (8, 6, 32)), jax.random.normal(keys[1], (8, 32))
    boxed = Stack().init(jax.random.key(0), *args)["params"]
    started = lora.init(jax.random.key(1), boxed, rank=4)
    both = shaken(tree.unbox(started)), shaken(tree.unbox(boxed))

    def loss(adapter, params):
        attached = lora.attach(params, adapter, alpha=2.0)
        return jnp.square(Stack().apply({"params": attached}, *args)).mean()

    run = jax.value_and_grad(loss)
    wanted, gradient = jax.jit(run)(*both)
    mesh = sharding.make_mesh(**sizes)
    put = lambda x, names: jax.device_put(x, sharding.shardings(names, mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
        found, own = jax.jit(run)(*map(put, both, (started, boxed)))
    assert abs(found - wanted) < 1e-5 * wanted
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(own, gradient, atol=1e-5 * largest)
    assert all(x.any() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    "targets, said",
    [
        ("attm", 'LoRA targets "attm" match no linear layer; did you mean "attn"?'),
        ("zzz", "expected a part of blocks/image/adaln/linear"),
        ("to_(q", "not a regular expression"),
    ],
)
def test_targets_in_nothing(boxed, targets, said):
    with pytest.raises(UserError, match=".*") as caught:
        lora.init(jax.random.key(0), boxed, rank=2, targets=targets)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_of_another_model(params):
    adapter = random_lora(params, targets="mlp/fc1")
    wide = jax.tree.map(lambda x: jnp.concatenate([x, x], -1), adapter)
    with pytest.raises(ValueError, match="LoRA blocks/image/mlp/fc1: a"):
        lora.attach(params, wide)
    with pytest.raises(ValueError, match="no parameters elsewhere"):
        lora.attach(params, {"elsewhere": adapter["blocks"]})
