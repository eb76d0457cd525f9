"""LoRA files against diffusers and peft, on the miniature SD3.5, in both directions."""

import json

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from parity import miniature

from sd3_jax import main
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import adapters, lora
from sd3_jax.params.adapters import Factors
from sd3_jax.sampling import bundle_loading
from sd3_jax.weights import adapter_files, peft_config
from sd3_jax.weights import lora_files as files

KIND = "sd35_medium"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "norm_out.linear"]


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def bundle(mesh):
    return bundle_loading.load(
        str(miniature.folder(KIND)), mesh=mesh, dtype="float32", only=("denoiser",)
    )


@pytest.fixture
def theirs():
    folder = miniature.folder(KIND)
    return diffusers.SD3Transformer2DModel.from_pretrained(folder / "transformer")


def loaded(mesh, *names, only=("denoiser",)):
    return bundle_loading.load(
        str(miniature.folder(KIND)), mesh=mesh, dtype="float32", only=only, lora=names
    )


def inputs():
    draw = np.random.default_rng(0).standard_normal
    shapes = (1, 8, 12, 16), (1, 9, 160), (1, 128)
    x, context, pooled = (draw(shape).astype(np.float32) for shape in shapes)
    return x, np.full(1, 0.3, np.float32), context, pooled


def run_theirs(model):
    x, t, context, pooled = map(torch.tensor, inputs())
    with torch.no_grad():
        v = model.eval()(x.permute(0, 3, 1, 2), context, pooled, t * 1000).sample
    return v.permute(0, 2, 3, 1).numpy()


def agree(ours, wanted, base):
    assert np.abs(np.asarray(ours) - wanted).max() <= 1e-4 * np.std(wanted)
    assert np.abs(wanted - np.asarray(base)).max() > 0.1 * np.std(wanted)  # it acts


def random_lora(params, rank, targets="", seed=0):
    made = lora.init(jax.random.key(seed), params, rank=rank, targets=targets)
    draw = np.random.default_rng(seed).standard_normal
    size = lambda x: x.shape[-1] ** -0.5
    noise = lambda x: (0.5 * size(x) * draw(x.shape)).astype(np.float32)
    return jax.tree.map(noise, made)


@pytest.fixture(scope="module")
def base(bundle):
    return np.asarray(bundle.velocity(*inputs()))


def pipeline(transformer):
    """As much of one as load_lora_weights looks at."""
    rest = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler")
    rest += ("tokenizer", "tokenizer_2", "tokenizer_3")
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, **dict.fromkeys(rest)
    )


def test_ours_of_all_linear_layers_in_diffusers(bundle, base, theirs, mesh, tmp_path):
    params = bundle.variables["denoiser"]["params"]
    made = random_lora(params, rank=3)
    parts = {"denoiser": bundle.modules["denoiser"]}
    file = files.save(tmp_path, {"denoiser": made}, parts, alpha=6.0)
    pipeline(theirs).load_lora_weights(tmp_path)
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    missed = [
        name
        for name, module in theirs.named_modules()
        if isinstance(module, linear)
        and "lora" not in name
        and "base_layer" not in name
    ]
    assert not missed
    wanted = run_theirs(theirs)
    again = loaded(mesh, f"{file}=1.0")
    agree(again.velocity(*inputs()), wanted, base)
    trained = lora.merge(params, made, alpha=6.0)
    found = again.merge_adapters().variables["denoiser"]["params"]
    chex.assert_trees_all_close(found, trained, atol=1e-6)


def test_theirs_here_and_merged_by_convert(bundle, base, theirs, mesh, tmp_path):
    """Ranks and alphas that differ by layer; some of q, k and v, some of the layers."""
    config = peft.LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=ATTENTION,
        exclude_modules=r".*blocks\.3\.attn\.to_k",
        rank_pattern={"to_v": 7, "transformer_blocks.2.attn.to_q": 2},
        alpha_pattern={"to_v": 3, "^transformer_blocks.0.attn.to_q": 5},
    )
    theirs.add_adapter(config)
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    wanted = run_theirs(theirs)
    layers = peft.get_peft_model_state_dict(theirs)
    metadata = theirs.peft_config["default"].to_dict()
    metadata = {k: list(v) if isinstance(v, set) else v for k, v in metadata.items()}
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=metadata,
    )
    found = loaded(mesh, str(tmp_path))
    agree(found.velocity(*inputs()), wanted, base)
    kernel = ("final_adaln", "linear", "kernel")
    (adapter,) = found.bank.adapters.values()
    assert isinstance(adapter["denoiser"][kernel], Factors)
    flags = [
        f"--config.weights={miniature.folder(KIND) / 'transformer'}",
        f"--config.sample.lora={tmp_path}=0.5,{tmp_path}=0.5",
        "--config.convert.to=original",
    ]
    recipe = "--config=configs/released.py:tiny"
    assert main.main(["convert", recipe, f"--workdir={tmp_path}", *flags]) == 0
    file = str(tmp_path / "model.safetensors")
    merged = bundle_loading.load(file, mesh=mesh, dtype="float32")
    agree(merged.velocity(*inputs()), wanted, base)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_several_weighed_as_in_diffusers(bundle, base, theirs, mesh, tmp_path, caplog):
    params = bundle.variables["denoiser"]["params"]
    parts = {"denoiser": bundle.modules["denoiser"]}
    pipe, ours = pipeline(theirs), loaded(mesh)
    for name, rank, targets in (("fine", 3, ""), ("ink", 2, "attn")):
        pair = random_lora(params, rank, targets, rank)
        files.save(tmp_path / name, {"denoiser": pair}, parts, alpha=2.0)
        pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        assert ours.load_adapter(tmp_path / name) == name
    for weights in ({"fine": 0.5, "ink": -2.0}, {"ink": 0.7}):
        pipe.set_adapters([*weights], [*weights.values()])
        ours.set_adapters(weights)
        agree(ours.velocity(*inputs()), run_theirs(theirs), base)
    file = tmp_path / "ink" / "pytorch_lora_weights.safetensors"
    assert ours.load_adapter(file, weight=0) == "pytorch_lora_weights"
    assert "both act" not in caplog.text
    assert ours.load_adapter(str(tmp_path / "ink"), weight=0) == "ink_2"
    assert 'ink: loaded again, as "ink_2" beside "ink"; both act' in caplog.text
    assert list(ours.adapters.values()) == [0.0, 0.7, 0.0, 0.0]


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, use_dora=True, bias="all", target_modules=ATTENTION),
        peft.LoKrConfig(r=4, alpha=6, target_modules=[*ATTENTION, "pos_embed.proj"]),
        peft.LoHaConfig(r=4, alpha=6, target_modules=ATTENTION),
    ],
    ids=["dora", "lokr", "loha"],
)
def test_other_kinds_run_as_in_pytorch(config, base, theirs, mesh, tmp_path):
    adapted = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape)
    adapted.save_pretrained(tmp_path)
    wanted = run_theirs(adapted.merge_and_unload())
    agree(loaded(mesh, str(tmp_path)).velocity(*inputs()), wanted, base)


def saved(path, tensors, metadata=None):
    made = {k: torch.as_tensor(x).contiguous() for k, x in tensors.items()}
    safetensors.torch.save_file(made, path, metadata=metadata)
    return path


def some(name="transformer.transformer_blocks.0.attn.to_q", rank=2, d=64):
    draw = np.random.default_rng(0).standard_normal
    a, b = draw((rank, d)), draw((d, rank))
    return {
        f"{name}.lora_A.weight": a.astype(np.float32),
        f"{name}.lora_B.weight": b.astype(np.float32),
    }


def tree_of(path, bundle):
    pairs = adapter_files.read(path)["denoiser"]
    params = bundle.variables["denoiser"]["params"]
    return files.load(pairs, "denoiser", bundle.modules["denoiser"], params)


@pytest.mark.parametrize(
    "form",
    [
        ("transformer.{}to_q.lora.down.weight", "transformer.{}to_q.lora.up.weight"),
        (
            "transformer.{}processor.to_q_lora.down.weight",
            "transformer.{}processor.to_q_lora.up.weight",
        ),
        ("{}to_q.lora_A.weight", "{}to_q.lora_B.weight"),  # a model's own adapter
    ],
)
def test_the_older_forms_that_diffusers_reads(form, bundle, tmp_path):
    plain = some()
    other = [name.format("transformer_blocks.0.attn.") for name in form]
    old = saved(tmp_path / "old.safetensors", dict(zip(other, plain.values())))
    new = saved(tmp_path / "new.safetensors", plain)
    jax.tree.map(
        np.testing.assert_array_equal, *(tree_of(p, bundle) for p in (old, new))
    )


def test_text_encoders_as_transformers_and_peft_have_them(mesh, tmp_path):
    from transformers import CLIPTextModelWithProjection

    ids = torch.tensor([[0, *range(5, 80), 2]])
    names, wanted, tensors = ("text_encoder", "text_encoder_2"), [], {}
    run_theirs = lambda model: model.eval()(ids, output_hidden_states=True)
    outputs = lambda out: (out.hidden_states[-2].numpy(), out.text_embeds.numpy())
    for i, name in enumerate(names):
        folder = miniature.folder(KIND) / name
        model = CLIPTextModelWithProjection.from_pretrained(folder)
        with torch.no_grad():
            before = outputs(run_theirs(model))
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "out_proj", "fc2"])
        model = peft.inject_adapter_in_model(config, model)
        torch.manual_seed(i)
        for key, p in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            after = outputs(run_theirs(model))
        wanted.append((after, before))
        state = peft.get_peft_model_state_dict(model)
        tensors |= {f"{name}.{key}": x for key, x in state.items()}
    # alpha 8, the default, of rank 3
    told = {
        f"{name}.{k}": v for name in names for k, v in dict(r=3, lora_alpha=8).items()
    }
    path = tmp_path / "text.safetensors"
    saved(path, tensors, {peft_config.METADATA: json.dumps(told)})
    found = loaded(mesh, str(path), only=("denoiser", "clip_l", "clip_g"))
    for name, (after, before) in zip(("clip_l", "clip_g"), wanted):
        module, weights = found.modules[name], np.ones(1, np.float32)
        run = jax.jit(lambda x, ids, m=module: m.apply(adapters.attached(x), ids))
        ours = run(found.adapted(name, weights), jnp.asarray(ids.numpy()))
        for x, y, z in zip(ours, after, before):
            agree(x, y, z)


def test_weights_add_up_and_count_in_the_fingerprint(bundle, mesh, tmp_path):
    params = bundle.variables["denoiser"]["params"]
    parts = {"denoiser": bundle.modules["denoiser"]}
    one, two = (random_lora(params, rank, "attn", rank) for rank in (2, 3))
    a = files.save(tmp_path / "a", {"denoiser": one}, parts)
    b = files.save(tmp_path / "b", {"denoiser": two}, parts)
    both = loaded(mesh, f"{a}=0.5", f"{b}=-2").merge_adapters()
    both = both.variables["denoiser"]["params"]
    merged = lora.merge(lora.merge(params, one, weight=0.5), two, weight=-2.0)
    chex.assert_trees_all_close(both, merged, atol=1e-6)
    prints = {loaded(mesh, f"{a}={weight}").fingerprint() for weight in (0.5, 0.6)}
    assert len(prints) == 2


def test_on_a_mesh_it_lies_as_its_kernels(bundle, tmp_path):
    parts = {"denoiser": bundle.modules["denoiser"]}
    made = random_lora(bundle.variables["denoiser"]["params"], 4, "attn/")
    file = files.save(tmp_path, {"denoiser": made}, parts)
    over = loaded(sharding.make_mesh(data=2, fsdp=4), str(file))
    (adapter,) = over.bank.adapters.values()
    attn = ("blocks", "image", "attn")
    qkv, out = (
        adapter["denoiser"][(*attn, name, "kernel")] for name in ("to_qkv", "to_out")
    )
    assert qkv.a.sharding.spec[1] == out.b.sharding.spec[2] == "fsdp"
    assert "fsdp" not in (*qkv.b.sharding.spec, *out.a.sharding.spec)
    wanted = made["blocks"]["image"]["attn"]["to_qkv"]
    np.testing.assert_array_equal(qkv.a, wanted["a"])
    np.testing.assert_array_equal(qkv.b, wanted["b"])


FIRST = "transformer.transformer_blocks.0.attn."


@pytest.mark.parametrize(
    "tensors, told, said",
    [
        (
            some(FIRST + "to_quu"),
            {},
            "to_quu is not a layer of the model; did you mea",
        ),
        (some(FIRST + "to_q", d=32), {}, "to_q.lora_A is [2, 32], expected [2, 64]"),
        (some() | some("transfomer.to_q"), {}, 'did you mean "transformer"?'),
        (dict([*some().items()][:1]), {}, "has only lora_A; expected"),
        (some() | {FIRST + "to_q.beta": np.ones(1)}, {}, "to_q.beta (unknown"),
        (
            {"lora_unet_a_b.lora_down.weight": np.ones((2, 2))},
            {},
            "a_b has only lora_A",
        ),
        (some(), {"transformer.use_dora": True}, "has no lora_magnitude_vector"),
        (some() | {FIRST + "to_q.oft_R": np.ones(64)}, {}, "OFT is not supported"),
        (some(), {"transformer.lora_alpha": "x"}, "lora_alpha x: expected a number"),
        ({k: x * np.nan for k, x in some().items()}, {}, "values that are not finite"),
        ({}, {}, "holds no tensors"),
    ],
)
def test_what_is_no_lora_of_ours(tensors, told, said, bundle, tmp_path):
    path = saved(
        tmp_path / "x.safetensors", tensors, {peft_config.METADATA: json.dumps(told)}
    )
    with pytest.raises(UserError) as caught:
        tree_of(path, bundle)
    message = str(caught.value)
    assert said in message and str(path) in message and "\n" not in message


def test_a_component_that_is_not_there(mesh, tmp_path):
    clip = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    path = saved(tmp_path / "x.safetensors", some(clip))
    file = str(miniature.folder(KIND) / "transformer")
    load = bundle_loading.load
    with pytest.raises(UserError, match="adapts clip_l, but the weights have only den"):
        load(file, mesh=mesh, lora=[str(path)])
    load(file, mesh=mesh, lora=[str(path)], only=("denoiser",))  # not wanted
    with pytest.raises(UserError, match='LoRA "no/such/file": no such file'):
        load(file, mesh=mesh, lora=["no/such/file=2"])
