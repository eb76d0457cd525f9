"""Adapters beside a bundle's weights: sums, sets for each row, and what compiles."""

import dataclasses

import jax
import numpy as np
import pytest
import safetensors.numpy
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import lora
from sd3_jax.params.adapters import Factors, Full
from sd3_jax.sampling.adapters.adapter_bank import Bank

RUN = dict(height=32, width=32, max_sequence_length=8, steps=2, output="latents")
ATTN = ("blocks", "image", "attn", "to_qkv", "kernel")
OUT = ("dual_blocks", "image", "attn2", "to_out", "kernel")
FINAL = ("final_adaln", "linear", "kernel")


def loaded(mesh=None, **options):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    source = str(miniature.folder("sd35_medium"))
    return sd3_jax.load(source, mesh, "float32", **options)


@pytest.fixture(scope="module")
def base():
    return loaded()


@pytest.fixture
def bundle(base):
    """The shared weights with a bank of this test's own."""
    return dataclasses.replace(base, bank=Bank())


def leaf(bundle, component, path):
    x = bundle.variables[component]["params"]
    for part in path:
        x = x[part]
    return x


def draw(seed, shape, size=0.3):
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return size * x / max(shape[-1], 1) ** 0.5


def factors(bundle, component, path, rank, seed):
    shape = tuple(leaf(bundle, component, path).shape)
    a, b = lora.layout(path[:-1], len(shape)).shapes(shape, rank)
    return Factors(draw(seed, a, 1.0), draw(seed + 1, b, 1.0))


def full(bundle, component, path, seed):
    return Full(draw(seed, tuple(leaf(bundle, component, path).shape)))


def style(bundle, seed=0, rank=3):
    """Factors of fused maps, of several inputs and of a vector, and of both CLIPs."""
    paths = [ATTN, OUT, FINAL, ("blocks", "text", "mlp", "fc1", "kernel")]
    clip = ("blocks", "fc2", "kernel")
    changes = {p: factors(bundle, "denoiser", p, rank, seed) for p in paths}
    text = {clip: factors(bundle, "clip_l", clip, rank + 1, seed + 9)}
    return {"denoiser": changes, "clip_l": text}


def whole(bundle, seed=50):
    """Changes of full rank, one of them beside factors of `style`."""
    kernels = {
        "denoiser": [ATTN, ("patch_embed", "kernel")],
        "t5": [("stack", "blocks", "wi", "kernel")],
    }
    return {
        name: {path: full(bundle, name, path, seed) for path in paths}
        for name, paths in kernels.items()
    }


def small(bundle, seed=90):
    """Changes of what modules read as arrays."""
    paths = {
        "denoiser": [
            ("blocks", "text", "attn", "norm_q", "scale"),
            ("last_block", "image", "mlp", "fc1", "bias"),
        ],
        "clip_g": [("tokens",), ("final_norm", "bias")],
    }
    return {
        name: {path: full(bundle, name, path, seed) for path in of_part}
        for name, of_part in paths.items()
    }


def inputs(rows=1):
    shapes = (rows, 4, 6, 16), (rows, 5, 160), (rows, 128)
    x, context, pooled = (draw(i, shape, 4.0) for i, shape in enumerate(shapes))
    return x, np.linspace(0.3, 0.8, rows, dtype=np.float32), context, pooled


def paint(bundle, prompts="a fox", **options):
    return np.asarray(sd3_jax.generate(bundle, prompts, **RUN | options))


def apart(a, b):
    return convert.error(np.asarray(a), np.asarray(b))


def test_they_act_as_merged_weights_do(bundle):
    plain = bundle.velocity(*inputs())
    texts = [bundle.encode_prompts("a fox", 8)]
    for name, make in (("style", style), ("whole", whole), ("small", small)):
        bundle.load_adapter(make(bundle), name, 0.7)
        texts.append(bundle.encode_prompts("a fox", 8))
        for one, other in zip(texts[-2], texts[-1]):
            if name != "whole" or one.ndim == 3:  # T5 has no pooled vector
                assert apart(one, other) > 0.01
    bundle.load_adapter(style(bundle, 20, rank=2), "other", -0.4)
    merged = bundle.merge_adapters()
    assert not merged.adapters and len(bundle.adapters) == 4
    v = bundle.velocity(*inputs())
    assert apart(v, merged.velocity(*inputs())) < 1e-5
    assert apart(v, plain) > 0.05
    for one, other in zip(*(x.encode_prompts("a fox", 8) for x in (bundle, merged))):
        assert apart(one, other) < 1e-5
    bundle.unload_adapters()
    np.testing.assert_array_equal(bundle.velocity(*inputs()), plain)


def test_weights_and_sets_for_each_prompt_compile_nothing(bundle, compilations):
    """Guidance, skipped layers and two pictures a prompt repeat the rows."""
    bundle.load_adapter(style(bundle), "style")
    bundle.load_adapter(whole(bundle), "whole")
    options = dict(skip_layers=[1], images_per_prompt=2, negative_prompts="blurred")
    prompts, sets = ["a fox", "an owl"], [{"style": 0.9}, {"whole": 0.6, "style": 0.2}]
    plain = paint(bundle, prompts, adapters={}, **options)
    rows = paint(bundle, prompts, adapters=[{}, {}], **options)
    assert apart(rows, plain) < 1e-5
    before = bundle.fingerprint()
    compilations.clear()
    by_row = paint(bundle, prompts, adapters=sets, **options)
    for i, weights in enumerate(sets):
        bundle.set_adapters(weights)
        assert bundle.adapters == dict.fromkeys(bundle.adapters, 0.0) | weights
        alone = paint(bundle, prompts, **options)
        assert apart(by_row[2 * i : 2 * i + 2], alone[2 * i : 2 * i + 2]) < 2e-5
        assert apart(alone, plain) > 0.05
    assert not compilations
    assert bundle.fingerprint() != before


def test_on_a_mesh_rows_and_factors_are_sharded(bundle):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    over = loaded(mesh, only=("denoiser",))
    for each in (bundle, over):
        for name, make in (("style", style), ("whole", whole)):
            parts = {"denoiser": make(bundle)["denoiser"]}
            each.load_adapter(parts, name, 0.5)
    sets = [{"style": 0.3 * i, "whole": 0.5 - 0.2 * i} for i in range(4)]
    for adapters in (None, sets):
        one, other = (x.velocity(*inputs(4), adapters=adapters) for x in (bundle, over))
        assert apart(other, one) < 1e-5
    changes = over.bank.adapters
    qkv, out = (changes["style"]["denoiser"][path] for path in (ATTN, OUT))
    assert qkv.a.sharding.spec[1] == out.b.sharding.spec[2] == "fsdp"
    delta = changes["whole"]["denoiser"][ATTN].delta
    assert delta.sharding == leaf(over, "denoiser", ATTN).sharding


def test_eight_bit_weights_stay_below(bundle):
    eight = loaded(quantize={"denoiser": "int8"}, only=("denoiser",))
    eight.load_adapter({"denoiser": style(bundle)["denoiser"]}, "style", 0.7)
    eight.load_adapter({"denoiser": whole(bundle)["denoiser"]}, "whole", 0.5)
    summed = eight.velocity(*inputs(2))
    assert apart(summed, eight.merge_adapters().velocity(*inputs(2))) < 1e-5
    assert (
        apart(eight.velocity(*inputs(2), adapters=[eight.adapters] * 2), summed) < 1e-5
    )
    assert leaf(eight, "denoiser", ATTN).q.dtype == np.int8


def test_norms_and_biases_have_one_weight_for_all_rows(bundle):
    bundle.load_adapter(small(bundle), "small")
    bundle.load_adapter(style(bundle), "style")
    sets = [{"small": 0.5, "style": 1.0}, {"small": 0.5, "style": -1.0}]
    by_row = bundle.velocity(*inputs(2), adapters=sets)
    for i, weights in enumerate(sets):
        alone = bundle.velocity(*inputs(2), adapters=weights)[i : i + 1]
        assert apart(by_row[i : i + 1], alone) < 1e-5
    with pytest.raises(UserError, match='"small" changes 2 biases.*norm_q/scale, last'):
        bundle.velocity(*inputs(2), adapters=[{"small": 1}, {"small": 0}])


def test_only_what_acts_counts_in_the_fingerprint(bundle):
    plain = bundle.fingerprint(), bundle.fingerprints()
    bundle.load_adapter(style(bundle), "style", 0.5)
    half = bundle.fingerprint()
    parts = bundle.fingerprints()
    assert {k for k, x in parts.items() if x != plain[1][k]} == {"denoiser", "clip_l"}
    bundle.set_adapters({"style": 0.25})
    assert len({half, plain[0], bundle.fingerprint()}) == 3
    bundle.set_adapters({})
    assert (bundle.fingerprint(), bundle.fingerprints()) == plain
    bundle.unload_adapters()
    bundle.load_adapter(style(bundle), "again", 0.5)
    assert bundle.fingerprint() == half


def test_what_is_refused(bundle):
    with pytest.raises(UserError, match='"style"; none is loaded'):
        bundle.set_adapters({"style": 1.0})
    made = style(bundle)
    bundle.load_adapter(made, "style")

    def refused(match, call, *args, **options):
        with pytest.raises(UserError, match=match):
            call(*args, **options)

    refused('"stile"; did you mean "style"', bundle.set_adapters, {"stile": 1.0})
    refused("weight nan: expected a finite", bundle.set_adapters, {"style": np.nan})
    refused("weight True", bundle.set_adapters, {"style": True})
    refused("'style': expected {name: weight}", bundle.bank.table, "style", 1)
    refused('"stile"; did you', bundle.unload_adapters, "stile")
    refused("loaded already", bundle.load_adapter, made, "style")
    refused("needs a name", bundle.load_adapter, made)
    refused("3 sets of adapters for 1 prompts", paint, bundle, adapters=[{}] * 3)
    refused("or a list of such sets", bundle.bank.table, ["style"], 1)
    refused("adapts vae2, but", bundle.load_adapter, {"vae2": made["clip_l"]}, "x")
    wrong = {p: Full(np.zeros((2, 2), np.float32)) for p in made["denoiser"]}
    wrong[("blocks", "unknown")] = Full(np.zeros(2, np.float32))
    refused(
        r"5 of 5 changes do not fit the model: denoiser/blocks/image/attn/to_qkv/kernel"
        r" is of \(2, 2\), expected \(1, 64, 3, 1, 64\).*unknown is not in the model",
        bundle.load_adapter,
        {"denoiser": wrong},
        "wrong",
    )
    assert bundle.adapters == {"style": 1.0}


class Unwritable:
    def __repr__(self):
        raise RuntimeError


def test_weights_that_are_no_numbers(bundle, tmp_path):
    bundle.load_adapter(style(bundle), "style")
    # Python writes no integer of more than 4300 digits.
    wrong = [[1, 2], np.ones(2), 1 + 1j, 10**400, 10**9999, None, "1", True, np.nan]
    for weight in [*wrong, object(), Unwritable()]:
        for call in (
            lambda x: bundle.load_adapter(style(bundle), "other", x),
            lambda x: bundle.load_adapter(tmp_path / "nowhere", "other", x),
            lambda x: bundle.set_adapters({"style": x}),
        ):
            with pytest.raises(UserError, match='^adapter ".*": weight .*finite'):
                call(weight)
    assert bundle.adapters == {"style": 1.0}


@pytest.mark.parametrize(
    "source, words",
    [
        *((x, "adapter .*: expected a file, a folder") for x in (None, 5, b"x", "")),
        ({"denoiser": 5}, "'denoiser' is 5; expected .*{path: change}"),
        ({"denoiser": {ATTN: 5}}, "is 5; expected a tuple of names, and Factors or"),
        ({"denoiser": {5: Full(np.ones(2))}}, ": 5 is Full"),
        ({"denoiser": {("blocks", 5): Full(np.ones(2))}}, "expected a tuple of names"),
        ({5: {ATTN: Full(np.ones(2))}}, ": 5 is .*expected a component"),
        ({"denoiser": {ATTN: Full([1, 2])}}, "of class list; expected arrays"),
        ({"denoiser": {ATTN: Full(np.ones(2, int))}}, "of int64; expected floats"),
    ],
)
def test_what_is_no_adapter(bundle, source, words):
    with pytest.raises(UserError, match=words) as error:
        bundle.load_adapter(source, "name")
    assert "\n" not in str(error.value) and not bundle.adapters


@pytest.mark.parametrize("to", [np.nan, np.inf, -np.inf, 1e30])
def test_values_that_cannot_be_computed_with(bundle, to):
    parts = {ATTN: factors(bundle, "denoiser", ATTN, 2, 0)}
    parts[FINAL] = full(bundle, "denoiser", FINAL, 1)
    for path in parts:
        for field in parts[path]._fields:
            change = parts[path]
            x = getattr(change, field).copy()
            x.flat[3] = to
            changes = parts | {path: change._replace(**{field: x})}
            with pytest.raises(UserError, match="1 of 2 changes .*1e.12 at most"):
                bundle.load_adapter({"denoiser": changes}, "x")
    large = jax.tree.map(lambda x: jax.numpy.asarray(1e25 * x), parts[ATTN])
    with pytest.raises(UserError, match="by up to .*e.5"):
        bundle.load_adapter({"denoiser": {ATTN: large}}, "x")


def test_only_names_components(bundle):
    adapter = style(bundle)
    for only in ["denoizer"], "denoizer", {"denoizer"}:
        with pytest.raises(UserError, match='only: .*; did you mean "denoiser"'):
            bundle.load_adapter(adapter, "style", only=only)
    for only in 5, None, [5]:
        with pytest.raises(UserError, match="only .*: expected names of components"):
            bundle.load_adapter(adapter, "style", only=only)
    for only in "denoiser", ["transformer"]:  # diffusers' folder is a name too
        bundle.load_adapter(adapter, "style", only=only)
        assert set(bundle.bank.adapters["style"]) == {"denoiser"}
        bundle.unload_adapters()


def test_names_print_on_one_line(bundle, tmp_path):
    for name in "a\nb", "a\x1b[2J", "", 5:
        with pytest.raises(UserError, match="expected a name that prints") as error:
            bundle.load_adapter(style(bundle), name)
        assert str(error.value).isprintable()
    (tmp_path / "cat\x1b[2J.safetensors").touch()
    with pytest.raises(UserError, match="expected a printable name"):
        bundle.load_adapter(tmp_path / "cat\x1b[2J.safetensors")


def test_an_adapter_of_a_text_encoder_after_an_embedding(bundle, tmp_path):
    vectors = {"clip_l": draw(0, (2, 64)), "clip_g": draw(1, (2, 64))}
    safetensors.numpy.save_file(vectors, tmp_path / "toy.safetensors")
    extended = bundle.load_embedding(tmp_path / "toy.safetensors", "<toy>")
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    shapes = {"lora_down.weight": (2, 64), "lora_up.weight": (64, 2)}
    tensors = {f"{layer}.{k}": draw(0, shape) for k, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, tmp_path / "cat.safetensors")
    assert extended.load_adapter(tmp_path / "cat.safetensors") == "cat"
    assert set(extended.bank.adapters["cat"]) == {"clip_l"}
    assert not bundle.adapters
    for token in 5, [5], b"x", {"a": 1}:
        with pytest.raises(UserError, match="token .*: expected a text"):
            bundle.load_embedding(tmp_path / "toy.safetensors", token)
    for source in 5, None, b"x":
        with pytest.raises(UserError, match="embedding .*: expected a file"):
            bundle.load_embedding(source)
