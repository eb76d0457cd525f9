"""Ring and Ulysses attention: equal to one device, and no whole keys anywhere."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from sd3_jax import tree
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models.attention import attention as kernels
from sd3_jax.models.attention.context import context_attention
from sd3_jax.models.controlnet import ControlNet
from sd3_jax.models.dit import CrossDiT
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.uvit import UViT
from sd3_jax.sampling import compiled
from sd3_jax.tools.plan import hlo, link_traffic

EIGHT = dict(data=2, fsdp=1, context=4)
MESHES = [
    EIGHT,  # both halves of guidance, and four devices each
    dict(fsdp=1, context=2, tensor=2),
    dict(data=1, fsdp=4, context=2),  # does not divide the two rows
]
SIZES = dict(width=32, num_heads=4)
MODELS = {
    # Text of 5 and 9 tokens, 35 of the image: nothing divides.
    "mmdit": MMDiT(2, **SIZES, dual_blocks=1, weight_sets=3, text_split=5, pos_size=16),
    "crossdit": CrossDiT(1, **SIZES, pos_size=16),
    "uvit": UViT(1, **SIZES, pos_size=16),
}


def make_mesh(sizes, shuffled=False):
    devices = jax.devices()[: np.prod([*sizes.values()])]
    if shuffled:  # as a TPU's torus numbers them, and further apart
        devices = [devices[i] for i in np.random.default_rng(0).permutation(8)]
        # Not make_mesh: it would sort them.
        shape = [sizes.get(axis, 1) for axis in sharding.AXES]
        kinds = (jax.sharding.AxisType.Auto,) * 4
        return jax.sharding.Mesh(np.reshape(devices, shape), sharding.AXES, kinds)
    return sharding.make_mesh(**sizes, devices=devices)


def arguments():
    draw = np.random.default_rng(0)
    normal = lambda *shape: draw.standard_normal(shape, np.float32)
    return (
        normal(2, 10, 14, 16),
        draw.random(2, np.float32),
        normal(2, 14, 8),
        normal(2, 8),
    )


def weights_of(module, *args):
    draw = np.random.default_rng(1)
    shapes = tree.unbox(jax.eval_shape(module.init, jax.random.key(0), *args))
    return jax.tree.map(lambda x: draw.normal(0, 0.2, x.shape).astype("f"), shapes)


def prepared(name):
    module = MODELS[name].clone(dtype=jnp.float32, remat="none")
    return module, weights_of(module, *arguments())


def differentiated(module):
    loss = lambda w, *args: jnp.mean(module.apply(w, *args) ** 2)
    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def on_one(name):
    module, weights = prepared(name)
    return jax.device_get(differentiated(module)(weights, *arguments()))


def close(found, expected, near=1e-5):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, rtol=0, atol=near * np.abs(y).max())


@pytest.mark.parametrize(
    ("name", "method", "sizes", "shuffled"),
    [
        ("mmdit", "ring", EIGHT, True),
        ("mmdit", "ulysses", EIGHT, False),
        ("crossdit", "ring", MESHES[1], False),
        ("crossdit", "ring", MESHES[2], False),
        ("uvit", "ulysses", MESHES[1], False),
        ("uvit", "ulysses", EIGHT, True),
    ],
)
def test_a_mesh_changes_neither_loss_nor_gradient(name, method, sizes, shuffled):
    module, weights = prepared(name)
    run = differentiated(module.clone(context_attention=method))
    with compiled.on(make_mesh(sizes, shuffled)):
        found = run(weights, *arguments())
    close(found, on_one(name))


@pytest.mark.parametrize(
    ("method", "skipped"), [("ring", "attention"), ("ulysses", "block")]
)
def test_layers_are_left_out(method, skipped):
    """PAG, whose texts still attend to all tokens, and skip-layer guidance."""
    module, weights = prepared("mmdit")
    options = dict(skip=(0, 1), skipped=skipped)
    run = jax.jit(lambda m, w, *args: m.apply(w, *args, **options), static_argnums=0)
    expected = run(module, weights, *arguments())
    with compiled.on(make_mesh(EIGHT)):
        found = run(module.clone(context_attention=method), weights, *arguments())
    close(found, expected)


def test_a_controlnet_attends_as_its_denoiser():
    net = ControlNet(depth=1, width=32, num_heads=4, pos_size=16, dtype=jnp.float32)
    xt, *rest = arguments()
    weights = weights_of(net, xt, *rest, xt)
    run = jax.jit(lambda net, *args: net.apply(*args), static_argnums=0)
    expected = run(net, weights, xt, *rest, xt)
    with compiled.on(make_mesh(EIGHT)):
        ring = dataclasses.replace(net, context_attention="ring")
        found = run(ring, weights, xt, *rest, xt)
        text = run.lower(ring, weights, xt, *rest, xt).as_text()
    close(found, expected)
    assert "collective_permute" in text


# --- one attention, whose program is short


def streams(image=4096, text=(77, 100), heads=4, dtype=jnp.float32):
    draw = np.random.default_rng(2)
    shapes = [(1, n, heads, 16) for n in (image, *text)]
    one = lambda: [jnp.asarray(draw.standard_normal(s), dtype) for s in shapes]
    return one(), one(), one()


def program(method, kernel="auto"):
    attend = functools.partial(context_attention, method=method, kernel=kernel)
    return jax.jit(attend)


def in_sharded(arrays, mesh):
    """Image tokens over the mesh, the texts' too where they divide."""
    place = lambda x: jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=jax.NamedSharding(
            mesh,
            jax.P(None, "context" if x.shape[1] % mesh.shape["context"] == 0 else None),
        ),
    )
    return jax.tree.map(place, arrays)


def compile_on(mesh, method, arrays):
    with compiled.on(mesh):
        return program(method).lower(*in_sharded(arrays, mesh)).compile()


def test_no_device_holds_more_than_its_share_of_keys_and_values(monkeypatch):
    """By the compiled programs: what they send, and the memory that they take."""
    monkeypatch.setattr(kernels, "LIMIT", 2**18)
    mesh, devices = make_mesh(dict(fsdp=1, context=8)), 8
    arrays = streams(image=2**14, text=(64,), heads=8)
    keys = 4 * arrays[1][0].size  # bytes of all of the image's keys
    temporary = {}
    for method in ("gather", "ring", "ulysses"):
        executable = compile_on(mesh, method, arrays)
        module = hlo.parse(executable.as_text())
        sent = [x for x, _ in link_traffic.collectives(module, mesh.shape)]
        largest = {}
        for x in sent:
            sides = [int(d) for d in re.findall(r"\d+", x.shape)[1:]]
            largest.setdefault(x.kind, []).append(4 * np.prod(sides))
        temporary[method] = executable.memory_analysis().temp_size_in_bytes
        whole = max(largest.get("all-gather", [0]))
        if method == "gather":
            assert whole == keys
        else:  # the text's at most
            assert whole <= 4 * arrays[1][1].size
        if method == "ring":
            # Keys and values go to seven other devices, a share each time: half of the
            # heads one way round, and half the other.
            half = keys / devices / 2
            assert largest["collective-permute"] == [half] * 4 * (devices - 1)
    # Gathered: keys and values whole. In the ring: two shares of both, and the parts'
    # outputs, 8 of a share each, as much as one of the two.
    assert temporary["ring"] < temporary["gather"] - 0.75 * keys
    assert temporary["ulysses"] < temporary["gather"] - 0.75 * keys


@pytest.mark.parametrize(
    ("image", "dtype"),  # of 3 tokens, one device has none
    [(8, jnp.bfloat16), (130, jnp.float32), (3, jnp.float32)],
)
def test_the_tpus_kernel_in_a_ring(image, dtype):
    arrays = streams(image=image, text=(5,), heads=1, dtype=dtype)
    expected = kernels.joint_attention(*streams(image=image, text=(5,), heads=1))
    with compiled.on(make_mesh(dict(fsdp=1, context=4))):
        found = program("ring", "splash")(*arrays)
    near = 1e-5 if dtype == jnp.float32 else 3e-2
    for x, y in zip(found, expected):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype("f"), y, rtol=0, atol=near)


def test_the_gradient_of_the_tpus_kernel_in_a_ring():
    arrays, douts = streams(130, (5,), heads=1), streams(130, (5,), heads=1)[2]

    def gradients(method, kernel):
        attend = functools.partial(context_attention, method=method, kernel=kernel)
        return jax.jit(lambda args, douts: jax.vjp(attend, *args)[1](douts))

    expected = gradients("gather", "xla")(arrays, douts)
    with compiled.on(make_mesh(dict(fsdp=1, context=4))):
        close(gradients("ring", "splash")(arrays, douts), expected)


def test_auto_takes_heads_where_they_divide():
    texts = {}
    for heads in (4, 6):
        arrays = streams(image=64, text=(8,), heads=heads)
        with compiled.on(make_mesh(dict(fsdp=1, context=4))):
            texts[heads] = program("auto").lower(*arrays).as_text()
    assert "all_to_all" in texts[4] and "collective_permute" not in texts[4]
    assert "collective_permute" in texts[6] and "all_to_all" not in texts[6]


@pytest.mark.parametrize("method", ["gather", "ring", "ulysses", "auto"])
def test_without_a_context_axis_the_program_is_the_plain_one(method):
    arrays = streams(image=64, text=(8,))
    with compiled.on(make_mesh(dict(data=4, fsdp=2))):
        texts = [program(m).lower(*arrays).as_text() for m in ("gather", method)]
    assert texts[0] == texts[1]


def test_what_cannot_work_says_what_would():
    arrays = streams(image=64, text=(8,), heads=6)
    with compiled.on(make_mesh(dict(fsdp=1, context=4))):
        with pytest.raises(ValueError, match="context to be one of 1, 2, 3, 6, or"):
            program("ulysses").lower(*arrays)
        with pytest.raises(ValueError, match='did you mean "ulysses"'):
            program("ulises").lower(*arrays)
        with pytest.raises(ValueError, match="no log-denominators"):
            program("ring", "dot_product").lower(*arrays)
    mesh = make_mesh(dict(fsdp=1, context=4, tensor=2))
    with pytest.raises(UserError, match="3 heads on each of tensor = 2; expected"):
        sharding.require_context("ulysses", 6, mesh)
    sharding.require_context("ring", 6, mesh)


def test_rows_that_are_too_few_leave_their_devices_to_the_tokens():
    sizes = lambda mesh: tuple(mesh.shape.values())
    whole = sharding.make_mesh()
    for rows, shape in {2: (1, 2, 4, 1), 6: (1, 2, 4, 1), 1: (1, 1, 8, 1)}.items():
        mesh = sharding.spread(whole, rows)
        assert sizes(mesh) == shape
        assert list(mesh.devices.flat) == list(whole.devices.flat)
    assert sharding.spread(whole, 16) is whole
    mixed = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert sizes(sharding.spread(mixed, 2)) == (2, 1, 2, 2)
    assert sharding.spread(mixed, 4) is mixed


def test_the_halves_of_guidance_are_computed_on_two_groups_of_devices():
    """One picture: with data = 2 a device makes half of one device's products."""
    module, weights = prepared("mmdit")
    shape = (8, 8, 16)
    draw = np.random.default_rng(3)
    normal = lambda *s: draw.standard_normal(s, np.float32)
    conds = [compiled.Conditioning(normal(1, 14, 8), normal(1, 8)) for _ in range(2)]
    one = np.float32(1)
    inputs = compiled.Inputs(
        jax.random.split(jax.random.key(0), 1),
        *conds,
        np.linspace(1, 0, 3, dtype="f"),
        np.float32(4),
        (one * 0, one),
        one * 0,
    )
    plan = compiled.Plan(module, ("euler",), shape, guided=True)
    latents, flops = [], []
    for sizes in (dict(fsdp=1), dict(data=2, fsdp=1)):
        mesh = make_mesh(sizes)
        with compiled.on(mesh), nn.logical_axis_rules(sharding.RULES):
            placed = compiled.place(inputs, mesh)
            executable = compiled.sample.lower(plan, weights, placed).compile()
            latents.append(np.asarray(compiled.sample(plan, weights, placed)))
        flops.append(executable.cost_analysis()["flops"])
    close(latents[1], latents[0])
    assert flops[1] < 0.55 * flops[0]
