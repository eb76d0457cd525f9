"""LoRA folders of PEFT and files of kohya's names, against what each of them merges."""

import json
import re

import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import (
    convert_sd3_transformer_checkpoint_to_diffusers as from_original,
)
from etils import epath
from parity import convert, miniature
from transformers import CLIPTextModelWithProjection

from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.params import lora
from sd3_jax.sampling import bundle_loading
from sd3_jax.sampling.adapters import lora_adapters as given
from sd3_jax.weights import adapter_files, key_mapping, peft_config
from sd3_jax.weights import lora_files as files
from sd3_jax.weights.components import COMPONENTS

KIND = "sd35_medium"
TARGETS = ["to_q", "to_v", "to_out.0", "add_k_proj", "ff.net.2", "norm_out.linear"]
PATTERNS = dict(
    rank_pattern={"to_v": 7, "transformer_blocks.2.attn.to_q": 2},
    alpha_pattern={"to_v": 3, "^transformer_blocks.0.attn.to_q": 5},
)


@pytest.fixture(scope="module")
def bundle():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    parts = ("denoiser", "clip_l")
    folder = str(miniature.folder(KIND))
    return bundle_loading.load(folder, mesh=mesh, dtype="float32", only=parts)


def transformer():
    return miniature.transformer(**miniature.KINDS[KIND])


def adapted(model, **options):
    """A PEFT model with an adapter that acts."""
    made = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(0)
    for key, p in made.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.3)
    return made


def loaded(path, bundle, name="denoiser"):
    pairs = adapter_files.read(path)
    assert list(pairs) == [name]
    params = bundle.variables[name]["params"]
    found = files.load(pairs[name], name, bundle.modules[name], params)
    return lora.merge(params, found)


def agree(merged, state, bundle, name="denoiser"):
    variables = bundle.variables[name] | {"params": merged}
    table = COMPONENTS[name].table(bundle.modules[name])
    keys = {p.key for p in key_mapping.pieces(variables, table, "diffusers")}
    rest = set(state) - keys
    assert all("position_ids" in key for key in rest)
    wanted = convert.from_torch(variables, table, state, ignore=rest)["params"]
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6)
    jax.tree.map(close, merged, wanted)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=4, lora_alpha=8),
        dict(r=4, lora_alpha=2, **PATTERNS),
        dict(r=4, lora_alpha=3, use_rslora=True, **PATTERNS),
    ],
    ids=["alpha", "patterns", "rslora"],
)
def test_a_folder_of_peft(options, bundle, tmp_path):
    theirs = adapted(transformer(), target_modules=TARGETS, **options)
    theirs.save_pretrained(tmp_path)
    state = theirs.merge_and_unload().state_dict()
    merged = loaded(tmp_path, bundle)
    agree(merged, state, bundle)
    params = bundle.variables["denoiser"]["params"]
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), merged, params)
    assert max(jax.tree.leaves(moved)) > 0.1
    file = (
        tmp_path / adapter_files.PEFT_FILE
    )  # by its own path, and with PEFT's names left
    jax.tree.map(np.testing.assert_array_equal, loaded(file, bundle), merged)
    named = {
        re.sub(r"(lora_[AB])", r"\1.default", key): x
        for key, x in safetensors.torch.load_file(file).items()
    }
    safetensors.torch.save_file(named, file)
    jax.tree.map(np.testing.assert_array_equal, loaded(tmp_path, bundle), merged)


def test_a_folder_of_a_text_encoders(bundle, tmp_path):
    folder = miniature.folder(KIND) / "text_encoder"
    model = CLIPTextModelWithProjection.from_pretrained(folder)
    theirs = adapted(model, r=3, lora_alpha=8, target_modules=["q_proj", "fc2"])
    theirs.save_pretrained(tmp_path)
    merged = loaded(tmp_path, bundle, "clip_l")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    changed = theirs.merge_and_unload().state_dict()
    known = lambda key: key if key in changed else key.removeprefix("text_model.")
    agree(merged, {key: changed[known(key)] for key in state}, bundle, "clip_l")


def test_the_width_tells_the_clips_apart(tmp_path):
    module = "base_model.model.text_model.encoder.layers.0"
    for width, name in ((768, "clip_l"), (1280, "clip_g")):
        sizes = {"self_attn.q_proj": (width, width), "mlp.fc2": (4 * width, width)}
        tensors = {}
        for key, (inputs, outputs) in sizes.items():
            tensors[f"{module}.{key}.lora_A.weight"] = torch.ones(8, inputs)
            tensors[f"{module}.{key}.lora_B.weight"] = torch.ones(outputs, 8)
        folder(tmp_path, tensors)
        assert list(adapter_files.read(tmp_path)) == [name]


def folder(path, tensors, config=None):
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, path / adapter_files.PEFT_FILE)
    (path / peft_config.CONFIG).write_text(json.dumps(config or {}))
    return path


ATTN = "transformer_blocks.0.attn.to_q"


def pair(module=f"base_model.model.{ATTN}", rank=8):
    return {
        f"{module}.lora_A.weight": torch.ones(rank, 64),
        f"{module}.lora_B.weight": torch.ones(64, rank),
    }


@pytest.mark.parametrize(
    "config, said",
    [
        (dict(peft_type="OFT"), "peft_type OFT is not supported; expected LORA, LOKR"),
        (dict(use_dora=True), "has no lora_magnitude_vector"),
        (dict(bias="boft_only"), "bias boft_only is not supported; expected none, all"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out True"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights pissa_niter_4"),
        (dict(layer_replication=[[0, 4]]), "layer_replication [[0, 4]]"),
        (dict(use_qalora=True), "use_qalora True"),
        (dict(of_the_future="x"), "of_the_future x"),
        (dict(lora_alpha="8"), "lora_alpha 8: expected a number"),
        (dict(lora_alpha=True), "lora_alpha True: expected a number"),
        (dict(r=[4]), "r [4]: expected a number"),
        (dict(r=4), f"{ATTN} has rank 4, but its tensors have 8"),
        (dict(rank_pattern={"to_q": 5}), f"{ATTN} has rank 5, but its tensors have 8"),
        (dict(rank_pattern={"to_q": None}), "expected numbers by pattern"),
        (dict(alpha_pattern=[1]), "alpha_pattern [1]: expected numbers by pattern"),
        (dict(alpha_pattern={"to_q": "x"}), "alpha_pattern to_q x: expected a number"),
        (dict(alpha_pattern={"to_(q": 1}), "pattern to_(q: missing )"),
        (dict(use_rslora="yes"), "use_rslora yes: expected true or false"),
    ],
)
def test_options_that_are_refused(config, said, tmp_path):
    refused(said, adapter_files.read, folder(tmp_path, pair(), config))


def refused(said, function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert said in str(caught.value) and "\n" not in str(caught.value)


WORDS = "base_model.model.text_model.embeddings.token_embedding"


@pytest.mark.parametrize(
    "tensors, said",
    [
        (
            {f"{WORDS}.lora_embedding_A": torch.ones(2, 2)},
            "1 of its 1 tensors cannot be applied: base_model",
        ),
        (
            {"base_model.model.x.hada_w1_a": torch.ones(2, 2)},
            "x has only hada_w1_a; expected hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b",
        ),
        (
            {"base_model.model.x.lokr_w1": torch.ones(2, 2)},
            "x has only lokr_w1; expected lokr_w2 or its factors",
        ),
        (pair() | pair(ATTN), "holds names with base_model.model. and names without"),
        (
            pair() | {k.replace("_A", "_A.b"): x for k, x in pair(rank=4).items()},
            "to_q has two tensors of this kind",
        ),
    ],
)
def test_tensors_that_are_refused(tensors, said, tmp_path):
    refused(said, adapter_files.read, folder(tmp_path, tensors))


def test_folders_that_are_refused(tmp_path):
    alone = folder(tmp_path / "alone", pair())
    (alone / peft_config.CONFIG).unlink()
    refused("adapter_config.json is missing beside it", adapter_files.read, alone)
    both = folder(tmp_path / "both", pair())
    safetensors.torch.save_file(pair(f"transformer.{ATTN}"), both / adapter_files.FILE)
    refused("name one of the two", adapter_files.read, both)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_model.bin").write_bytes(b"PK\x03\x04")
    refused("is a pickle", adapter_files.read, pickled)
    folder(tmp_path / "outer", pair())
    refused(f"name {tmp_path / 'alone'}", adapter_files.read, outer(tmp_path))
    folder(tmp_path / "text", pair())
    (tmp_path / "text" / peft_config.CONFIG).write_text("{")
    refused("adapter_config.json: not JSON", adapter_files.read, tmp_path / "text")


def outer(path):
    (path / "alone" / peft_config.CONFIG).write_text("{}")
    return path


def test_a_hub_name_brings_the_configuration_too(tmp_path, monkeypatch):
    def resolve(source, wanted, *, label):
        assert source == "owner/name" and peft_config.CONFIG in wanted
        return folder(tmp_path, pair())

    monkeypatch.setattr(given.sources, "resolve", resolve)
    assert given.opened(["owner/name=2"], (), ())[0].layers == {}


def test_a_name_that_ends_in_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    epath.Path("step=1000").mkdir()
    assert given.named("step=1000") == ("step=1000", 1.0)
    assert given.named("step=1000=0.5") == ("step=1000", 0.5)
    assert given.named("step=2000") == ("step", 2000.0)
    assert given.named("a=b") == ("a=b", 1.0)
    assert given.named("a=0") == ("a", 0.0)
    assert given.named("a=-1e-1") == ("a", -0.1)
    for number in ("nan", "inf", "-inf"):
        refused("expected a finite number", given.listed, f"a={number}")


def kohya(bundle, modules, rank=4, alpha=2.0):
    """A file by sd-scripts' rules for maps of the original file, and the deltas."""
    variables = bundle.variables["denoiser"]
    table = COMPONENTS["denoiser"].table(bundle.modules["denoiser"])
    pieces = key_mapping.pieces(variables, table, "original")
    deltas = {p.key: torch.zeros(p.file_shape) for p in pieces}
    draw, tensors = torch.Generator().manual_seed(0), {}
    for module in modules:
        weight = deltas[f"{module}.weight"]
        down = torch.randn(rank, *weight.shape[1:], generator=draw) / 8
        up = torch.randn(len(weight), rank, *(1,) * (weight.ndim - 2), generator=draw)
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
        delta = up.reshape(len(up), rank) @ down.reshape(rank, -1) * (alpha / rank)
        deltas[f"{module}.weight"] = delta.reshape(weight.shape)
    return tensors, deltas


def test_kohyas_names_are_those_of_the_original_file(bundle, tmp_path):
    """diffusers turns the deltas to its own layout, where halves change places."""
    modules = [
        "joint_blocks.0.x_block.attn.qkv",
        "joint_blocks.2.context_block.attn.qkv",
        "joint_blocks.1.x_block.attn2.proj",
        "joint_blocks.3.x_block.mlp.fc1",
        "joint_blocks.0.x_block.adaLN_modulation.1",
        "joint_blocks.3.context_block.adaLN_modulation.1",
        "final_layer.adaLN_modulation.1",
        "context_embedder",
        "x_embedder.proj",
    ]
    tensors, deltas = kohya(bundle, modules)
    file = tmp_path / "kohya.safetensors"
    safetensors.torch.save_file(tensors, file)
    changes = from_original(dict(deltas))
    base = transformer().state_dict()
    agree(loaded(file, bundle), {k: x + changes[k] for k, x in base.items()}, bundle)
    comfy = {
        re.sub(r"^lora_unet_\w+", f"diffusion_model.{name}", key): x
        for name in modules
        for key, x in tensors.items()
        if key.startswith(f"lora_unet_{name.replace('.', '_')}.")
    }
    assert len(comfy) == len(tensors)
    merged = loaded(file, bundle)
    safetensors.torch.save_file(comfy, file)
    jax.tree.map(np.testing.assert_array_equal, loaded(file, bundle), merged)
    onetrainer = {
        f"lora_transformer_{ATTN.replace('.', '_')}.{end}.weight": x
        for end, x in (("lora_down", torch.ones(2, 64)), ("lora_up", torch.ones(64, 2)))
    }
    safetensors.torch.save_file(onetrainer, file)
    merged = loaded(file, bundle)
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(pair(f"transformer.{ATTN}", rank=2), plain)
    jax.tree.map(np.testing.assert_array_equal, merged, loaded(plain, bundle))


QKV = "lora_unet_joint_blocks_0_x_block_attn_qkv"


@pytest.mark.parametrize(
    "more, said",
    [
        ({"lora_unet_x.alpha": torch.ones(1)}, "x has only alpha"),
        ({f"{QKV}.alpha": torch.ones(2)}, "alpha: expected one finite number"),
        ({f"{QKV}.alpha": torch.tensor(torch.nan)}, "expected one finite number"),
        ({"lora_te3_x.lora_up.weight": torch.ones(2, 2)}, "x has only lora_B"),
        ({"lora_unet_x.dora_scale": torch.ones(2)}, "x has norms of DoRA alone"),
        (
            pair("lora_unet_down_blocks_0"),
            "is an adapter of Stable Diffusion 1, 2 or XL (lora_unet_down_blocks_0.lo",
        ),
    ],
)
def test_files_of_kohya_that_are_refused(more, said, bundle, tmp_path):
    tensors, _ = kohya(bundle, ["joint_blocks.0.x_block.attn.qkv"])
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors | more, file)
    refused(said, loaded, file, bundle)
