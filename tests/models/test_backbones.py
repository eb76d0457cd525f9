"""The paper's backbones: one interface, one size, and what tells them apart."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import backbones
from sd3_jax import tree
from sd3_jax.assembly import model_parts
from sd3_jax.config.validation import validate
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models.denoisers import denoiser_class
from sd3_jax.models.unet import UNet
from sd3_jax.models.uvit import UViT
from sd3_jax.sampling import compiled
from sd3_jax.training import optimizer

TOKENS = dict(depth=3, width=32, num_heads=2, pos_size=8, pos_base=4)
SIZES = dict(
    dit=TOKENS,
    crossdit=TOKENS,
    uvit=TOKENS,
    unet=dict(depth=1, width=8, num_heads=2, multipliers=(1, 2), attended=(1,)),
)
OTHERS = tuple(SIZES)
B, SIDE, L, CHANNELS = 4, 8, 5, 3
each = pytest.mark.parametrize("name", OTHERS)


def model_of(name, **options):
    shared = dict(patch=2, channels=CHANNELS, dtype=jnp.float32, remat="none")
    return denoiser_class(name)(**SIZES[name] | shared | options)


def inputs(seed=0):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape, np.float32))
    t = jnp.asarray(draw.random(B, np.float32))
    return normal(B, SIDE, SIDE, CHANNELS), t, normal(B, L, 12), normal(B, 10)


@functools.cache
def abstract(name):
    return jax.eval_shape(model_of(name).init, jax.random.key(0), *inputs())["params"]


@functools.cache
def weights(name):
    """None is zero, as after training."""
    draw = np.random.default_rng(0)
    size = lambda x: 1.0 / np.sqrt(max(1, np.prod(x.shape[:-1])))
    normal = lambda x: draw.standard_normal(x.shape, np.float32)
    leaf = lambda x: jnp.asarray(normal(x) * (0.1 + size(x)))
    return jax.tree.map(leaf, tree.unbox(abstract(name)))


@functools.cache
def gradients(name, **options):
    """Of weights and inputs, and the velocity, by one program."""
    return programmed(name, **options)(weights(name), *inputs())


def programmed(name, **options):
    model = model_of(name, **options)
    target = inputs(1)[0]

    def loss(params, *args):
        v = model.apply({"params": params}, *args)
        return jnp.mean(jnp.square(v - target)), v

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


# One interface


@each
def test_a_velocity_in_float32_that_every_input_moves(name):
    """A gradient reaches every weight, every pixel, t, and every token of the text."""
    (_, v), (params, *rest) = gradients(name)
    chex.assert_shape(v, (B, SIDE, SIDE, CHANNELS))
    assert v.dtype == jnp.float32
    for path, g in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "bias" and path[-2].key == "to_kv":
            g = g[..., 1, :, :]  # a key's bias changes no softmax
        if path[-1].key == "bias" and path[-2].key == "to_qkv":
            g = g[..., [0, 2], :, :]
        dead = np.abs(g).reshape(-1, g.shape[-1]).max(-1) == 0
        assert not dead.all() and np.isfinite(g).all(), jax.tree_util.keystr(path)
    xt, t, context, pooled = map(np.abs, rest)
    assert xt.min() > 0 and t.min() > 0
    assert context.max(-1).min() > 0 and pooled.max(-1).min() > 0


@each
def test_a_new_denoiser_says_nothing(name):
    last = "conv_out" if name in ("uvit", "unet") else "final"
    model, args = model_of(name), inputs()
    init = jax.jit(lambda key: tree.unbox(model.init(key, *args)["params"][last]))
    chex.assert_trees_all_equal(
        *(jax.tree.map(f, init(jax.random.key(0))) for f in (jnp.array, jnp.zeros_like))
    )


@each
def test_bfloat16_is_asked_for_once(name):
    v = jax.eval_shape(
        model_of(name, dtype=jnp.bfloat16).apply, {"params": weights(name)}, *inputs()
    )
    assert v.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(abstract(name))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("name", "options"),
    [("dit", dict(unroll=3)), ("crossdit", dict(unroll=3, remat="attention"))]
    + [("uvit", dict(unroll=3, remat="attention"))],
)
def test_unrolling_and_remat_change_nothing(name, options):
    ours, theirs = gradients(name), gradients(name, **options)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 + 2e-5 * np.abs(x).max())


@each
def test_a_mesh_changes_no_gradient(name):
    sizes = dict(data=1, fsdp=2, context=2, tensor=2)
    wanted = gradients(name)
    with compiled.on(sharding.make_mesh(**sizes)):
        found = programmed(name)(weights(name), *inputs())
    for x, y in zip(jax.tree.leaves(wanted), jax.tree.leaves(found)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 + 1e-4 * np.abs(x).max())


# What tells them apart


def attended(name, changed):
    """Every block's self-attention, as it goes into the tokens: (depth, b, n, d)."""
    model, (xt, t, context, pooled) = model_of(name), inputs()
    run = jax.jit(
        lambda *args: model.apply(
            {"params": weights(name)},
            *args,
            capture_intermediates=lambda module, method: method == "project",
            mutable="intermediates",
        )
    )
    _, state = run(xt, t, context + changed, pooled)
    return state["intermediates"]["blocks"]["attn"]["project"][0]


def test_where_text_meets_image():
    """Among CrossDiT's tokens there is no text, of whose order nothing knows; DiT's has
    n + l tokens in one sequence."""
    n = (SIDE // 2) ** 2
    same = [attended("crossdit", x) for x in (0.0, 1.0)]
    assert same[0].shape[-2] == n
    chex.assert_trees_all_equal(same[0][0], same[1][0])  # the first of the scan
    assert not np.allclose(same[0][1], same[1][1], atol=1e-3)
    other = [attended("dit", x) for x in (0.0, 1.0)]
    assert other[0].shape[-2] == n + L
    assert not np.allclose(other[0][0, :, :n], other[1][0, :, :n], atol=1e-3)


@each
def test_a_set_of_text_tokens_and_a_picture_of_image_tokens(name):
    xt, t, context, pooled = inputs()
    run = jax.jit(lambda *args: model_of(name).apply({"params": weights(name)}, *args))
    plain = run(xt, t, context, pooled)
    turned = run(xt, t, context[:, ::-1], pooled)
    chex.assert_trees_all_close(plain, turned, atol=1e-4)
    mirrored = run(xt[:, :, ::-1], t, context, pooled)
    assert not np.allclose(plain, mirrored[:, :, ::-1], atol=1e-2)


def test_long_skips_join_a_block_with_its_mirror_image():
    """Of depth 5: cut off one by one, each changes the velocity, and the first block's
    skip reaches the last block and no other."""
    model, args = model_of("uvit", depth=5), inputs()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
    draw = np.random.default_rng(0)
    leaf = lambda x: draw.standard_normal(x.shape, np.float32) * 0.1
    params = jax.tree.map(leaf, tree.unbox(shapes))
    d = model.width

    @jax.jit
    def run(cut_off, noise):
        kernel = params["out_blocks"]["skip"]["kernel"]  # (2, 2d, d)
        kernel = kernel.at[:, d:].multiply(1.0 - cut_off[:, None, None])
        skip = params["out_blocks"]["skip"] | {"kernel": kernel}
        changed = params | {"out_blocks": params["out_blocks"] | {"skip": skip}}
        # The middle reads nothing of the first half: its skips alone remain.
        silent = kernel.at[0, :d].set(0.0)
        alone = params | {
            "out_blocks": params["out_blocks"] | {"skip": {**skip, "kernel": silent}}
        }
        fc2 = params["in_blocks"]["mlp"]["fc2"]
        moved = fc2 | {"bias": fc2["bias"].at[1].add(noise)}
        mlp = params["in_blocks"]["mlp"] | {"fc2": moved}
        alone |= {"in_blocks": params["in_blocks"] | {"mlp": mlp}}
        return (
            model.apply({"params": changed}, *args),
            model.apply({"params": alone}, *args),
        )

    params = jax.tree.map(jnp.asarray, params)
    none = jnp.zeros(2)
    whole, still = run(none, 0.0)
    for i in range(2):
        assert not np.allclose(run(none.at[i].set(1.0), 0.0)[0], whole, atol=1e-3)
    # The second block's output reaches the end by out block 0 alone.
    assert not np.allclose(run(none, 3.0)[1], still, atol=1e-3)
    cut_off = none.at[0].set(1.0)
    chex.assert_trees_all_close(run(cut_off, 3.0)[1], run(cut_off, 0.0)[1], atol=1e-5)


@each
def test_sides_that_patches_do_not_divide_are_refused(name):
    xt, *rest = inputs()
    with pytest.raises(ValueError, match="latents of 5x8: expected sides that"):
        jax.eval_shape(model_of(name).init, jax.random.key(0), xt[:, :5], *rest)


def test_what_a_uvit_and_a_unet_refuse():
    with pytest.raises(ValueError, match="depth 4: expected an odd number"):
        jax.eval_shape(model_of("uvit", depth=4).init, jax.random.key(0), *inputs())
    xt, *rest = inputs()
    with pytest.raises(ValueError, match="6x8: expected sides that 4 divides"):
        jax.eval_shape(model_of("unet").init, jax.random.key(0), xt[:, :6], *rest)
    wide = jnp.zeros((B, 12, 20, CHANNELS))
    apply = lambda x: model_of("unet").apply({"params": weights("unet")}, x, *rest)
    assert jax.eval_shape(apply, wide).shape == wide.shape  # any side that divides


# One size


@functools.cache
def count(variant):
    c = backbones.get_config(variant)
    validate(c)
    made = model_parts.build_parts(c)
    params = jax.eval_shape(made.objective.init, jax.random.key(0))
    return tree.count(params["denoiser"]), tree.count(params["text"])


@pytest.mark.parametrize("size", ["", "-2b"])
@pytest.mark.parametrize("name", backbones.NAMES)
def test_as_many_parameters_as_the_mmdit(name, size):
    (ours, text), (theirs, same) = count(name + size), count("mmdit" + size)
    assert abs(ours / theirs - 1) < 0.05 and text == same


def test_stable_diffusion_2():
    """865.9 M, as published, and what pooled text and biases of q, k and v add."""
    shapes = (1, 64, 64, 4), (1,), (1, 77, 1024), (1, 1024)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    params = jax.eval_shape(UNet().init, jax.random.key(0), *args)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = [(jax.tree_util.keystr(path), x.size) for path, x in leaves]
    extra = lambda s: "pooled" in s or "'bias'" in s and ("to_qkv" in s or "to_kv" in s)
    extra_q = lambda s: "'to_q'" in s and "'bias'" in s
    published = sum(size for s, size in named if not (extra(s) or extra_q(s)))
    features = 64 * 1280  # of the time there are 320, here 256
    assert published + features == 865_910_724


def products(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a program, those of a scan as
    often as it runs; rims of convolutions count as if they were inside."""
    total = 0.0
    for eqn in jaxpr.eqns:
        out = eqn.outvars[0].aval.size
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * out * math.prod(shape[axis] for axis in contracted)
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out * kernel.size / features
        times = eqn.params.get("length", 1)
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program)
        total += times * sum(products(opened(x)) for x in inner if is_program(x))
    return total


def is_program(x) -> bool:
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def opened(x):
    return x.jaxpr if hasattr(x, "jaxpr") else x


@each
def test_the_flops_are_the_programs(name):
    model, (_, *rest) = model_of(name), [x[:1] for x in inputs()]
    args = [jnp.zeros((1, SIDE, SIDE, CHANNELS)), *rest]
    params = tree.unbox(jax.eval_shape(model.init, jax.random.key(0), *args))
    made = products(jax.make_jaxpr(model.apply)(params, *args).jaxpr)
    ours = model.flops(height=SIDE, width=SIDE, text=L, text_dim=12)
    assert ours == pytest.approx(
        made, rel=1e-3
    )  # but for what pooled text goes through


# What trains them


@each
def test_muon_takes_the_matrices_inside_blocks(name):
    shapes = {"denoiser": tree.unbox(abstract(name))}
    axes = optimizer.matrices(shapes)
    shape = {}
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        shape[tree.names(path)] = x.shape
    leaf = lambda x: x is None or not isinstance(x, dict)
    taken = {
        tree.names(path): x
        for path, x in jax.tree_util.tree_leaves_with_path(axes, is_leaf=leaf)
        if x is not None
    }
    layers = {names[-2] for names in taken}
    wanted = dict(
        dit={"to_qkv", "to_out", "fc1", "fc2"},
        crossdit={"to_qkv", "to_out", "to_q", "to_kv", "fc1", "fc2"},
        uvit={"to_qkv", "to_out", "fc1", "fc2", "skip"},
        unet={"to_qkv", "to_out", "to_q", "to_kv", "wi", "wo", "proj_in", "proj_out"},
    )
    assert layers == wanted[name]
    assert not any("embed" in part for names in taken for part in names)
    stacked = name != "unet"
    for names, x in taken.items():
        full, used = shape[names], {*x.reduction_axis, *x.output_axis}
        batch = [size for i, size in enumerate(full) if i not in used]
        three = dict(to_qkv=[3], to_kv=[2], wi=[2]).get(names[-2], [])
        assert batch == ([full[0]] if stacked else []) + three, names


# What only one of them has


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            dict(name="dit", dual_blocks=1),
            "dual_blocks = 1: expected 0, or config.model.",
        ),
        (dict(name="dit", weight_sets=3), "weight_sets = 3: expected 2, or config.mod"),
        (
            dict(name="uvit", pos_crop="random"),
            '"random": expected "center", or config.',
        ),
        (dict(name="uvit", depth=24), "depth = 24: expected an odd number for a uvit"),
        (
            dict(name="unet", multipliers=(1, 2), context_attention="ring"),
            'context_attention = "ring": expected "gather" for a unet',
        ),
        (dict(name="unet"), r"multipliers = \(\): expected some for a unet"),
        (
            dict(multipliers=(1, 2)),
            r"multipliers = \(1, 2\): expected \(\), or config.mo",
        ),
        (
            dict(attended=(1,)),
            r"attended = \(1,\): expected \(\), or config.model.name",
        ),
        (dict(name="unet", multipliers=(1, 2), attended=(2,)), "levels below 2"),
        (dict(name="unet", multipliers=(1, 0)), "one for each level"),
        (dict(name="crossdit", num_heads=7), "width = 1536: expected a multiple of"),
    ],
)
def test_refused_options(given, wanted):
    c = backbones.get_config("mmdit-2b")
    c.model.update(given)
    with pytest.raises(UserError, match=wanted) as told:
        validate(c)
    assert "\n" not in str(told.value)


def test_a_picture_that_a_unet_cannot_halve_is_refused():
    c = backbones.get_config("unet-2b")
    c.image.height = 264
    with pytest.raises(UserError, match=r"multiple of 64 \(8 pixels.*halved 3 times"):
        validate(c)


def test_jobs_that_know_the_mmdit_alone_say_so():
    with pytest.raises(UserError, match='"dit": no other; expected "mmdit"'):
        model_parts.mmdit(ConfigDict(dict(name="dit")), "no other")
    with pytest.raises(ValueError, match='"vit": expected one of mmdit'):
        backbones.matched(backbones.get_config(), "vit")


def test_matched_is_for_any_recipe_of_the_digits():
    c = backbones.get_config("mmdit")
    for name in backbones.NAMES:
        assert backbones.get_config(name).model.to_dict() == (
            backbones.matched(c.copy_and_resolve_references(), name).model.to_dict()
        )
    assert isinstance(model_parts.denoiser(backbones.matched(c, "uvit").model), UViT)
