"""Released files in every layout: loaded, written again, and read by diffusers."""

import functools
import json
import tempfile
from pathlib import Path

import diffusers
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.weights.components import COMPONENTS

# All kinds have the same text encoders, and our own format asks for no names.
one_kind = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind == "sd35_medium" else pytest.mark.slow)
        for kind in miniature.KINDS
    ],
    indirect=True,
    scope="module",
)

PROMPTS = ["a red fox", "in the rain"]
RUN = dict(height=64, width=64, steps=2, max_sequence_length=20, output="latents")


def load(source, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    options = dict(dtype="float32", tokenizers_from=words()) | options
    return sd3_jax.load(str(source), mesh=mesh, **options)


def words():
    return str(miniature.folder("sd3_medium"))


def tensors(path):
    """Every tensor in a file or below a folder, by component folder and name."""
    files = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    found = {}
    for file in files:
        part = "" if path.is_file() else file.parent.name + "/"
        for name, x in safetensors.torch.load_file(file).items():
            found[part + name] = x
    return found


def equal(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert x.dtype == b[name].dtype and x.shape == b[name].shape, name
        assert torch.equal(x, b[name]), name


def same_variables(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.fixture(scope="module", params=miniature.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(kind):
    return load(miniature.folder(kind))


def test_diffusers_folders_are_the_same_after_a_round_trip(kind, bundle, tmp_path):
    sd3_jax.save(bundle, tmp_path, "diffusers")
    equal(tensors(tmp_path), tensors(miniature.folder(kind)))
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path)
    original = diffusers.StableDiffusion3Pipeline.from_pretrained(
        miniature.folder(kind)
    )
    run = dict(prompt=PROMPTS, height=64, width=64, num_inference_steps=2)
    images = [
        pipe(**run, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for pipe in (theirs, original)
    ]
    np.testing.assert_array_equal(*images)


def test_single_files_are_the_same_after_a_round_trip(kind, bundle, tmp_path):
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    sd3_jax.save(bundle, once, "original")
    again = load(once)
    same_variables(bundle, again)
    sd3_jax.save(again, twice, "original")
    assert once.read_bytes() == twice.read_bytes()
    images = [sd3_jax.generate(b, PROMPTS, **RUN) for b in (bundle, again)]
    np.testing.assert_array_equal(*images)


@one_kind
def test_our_own_format(bundle, tmp_path):
    sd3_jax.save(bundle, tmp_path / "ours", "orbax")
    again = load(tmp_path / "ours")
    same_variables(bundle, again)
    assert again.configs == bundle.configs


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_what_it_was(dtype, tmp_path):
    source, out = tmp_path / "half", tmp_path / "out"
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(words())
    pipe.to(getattr(torch, dtype)).save_pretrained(source)
    bundle = load(source)
    assert {x for part in bundle.file_dtypes.values() for x in part.values()} == {dtype}
    sd3_jax.save(bundle, out, "diffusers")
    equal(tensors(out), tensors(source))


def test_mixed_precision_stays_what_it_was(tmp_path):
    """As transformers saves T5 in float16: wo in float32. As stored or read wider."""
    source = tmp_path / "mixed"
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(words())
    pipe.to(torch.float16)
    for block in pipe.text_encoder_3.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    pipe.save_pretrained(source)
    for dtype in "float32", "stored":
        sd3_jax.save(load(source, dtype=dtype), tmp_path / dtype, "diffusers")
        equal(tensors(tmp_path / dtype), tensors(source))
    bundle = load(source, dtype="stored")
    kinds = {x.dtype.name for x in jax.tree.leaves(bundle.variables["t5"])}
    assert kinds == {"float16", "float32"}
    sd3_jax.save(bundle, tmp_path / "ours", "orbax")
    again = load(tmp_path / "ours", dtype="stored")
    same_variables(bundle, again)
    assert again.file_dtypes == bundle.file_dtypes
    sd3_jax.save(again, tmp_path / "again", "diffusers")
    equal(tensors(tmp_path / "again"), tensors(source))
    sd3_jax.save(bundle, tmp_path / "all16", "diffusers", dtype="bfloat16")
    assert {x.dtype for x in tensors(tmp_path / "all16").values()} == {torch.bfloat16}


def test_diffusers_reads_a_single_file_of_ours(tmp_path):
    """Its own converter maps our names back to the folder's, tensor by tensor."""
    from diffusers.loaders import single_file_utils

    folder = miniature.folder("sd35_medium")
    path = tmp_path / "model.safetensors"
    sd3_jax.save(load(folder), path, "original")
    state = safetensors.torch.load_file(path)
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    wanted = safetensors.torch.load_file(
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    equal(found, wanted)


@functools.cache
def published(kind):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        sd3_jax.save(load(miniature.folder(kind)), path, "original")
        return safetensors.torch.load_file(path)


def single(tmp_path, kind="sd35_large"):
    """A single file as it is published; CLIP-L's projection is not in one."""
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(published(kind), path)
    return path


def test_a_file_as_it_is_published(tmp_path):
    """No configurations within: all is read off names and shapes."""
    path = single(tmp_path)
    bundle, folder = load(path), load(miniature.folder("sd35_large"))
    assert set(bundle.modules) == set(COMPONENTS)
    images = [sd3_jax.generate(b, PROMPTS, **RUN) for b in (bundle, folder)]
    assert convert.error(images[0], np.asarray(images[1])) > 1e-3  # CLIP-L's own
    # T5's and CLIP's head sizes are not in a file; all else must be found.
    for name in ("num_layers", "num_attention_heads", "pos_embed_max_size", "qk_norm"):
        assert bundle.configs["denoiser"][name] == folder.configs["denoiser"][name]


def test_encoders_in_files_of_their_own(tmp_path):
    """With the prefix of the whole file, which tells miniature CLIPs from each other;
    the published ones are told by their width (tests/weights/test_single_file.py)."""
    whole = single(tmp_path)
    state = safetensors.torch.load_file(whole)
    files = []
    for name in ("clip_l", "clip_g", "t5xxl"):
        prefix = f"text_encoders.{name}.transformer."
        own = {k: state.pop(k) for k in list(state) if prefix in k}
        safetensors.torch.save_file(own, tmp_path / f"a,{name}.safetensors")
        files.append(tmp_path / f"a,{name}.safetensors")
    safetensors.torch.save_file(state, tmp_path / "rest.safetensors")
    rest = load(tmp_path / "rest.safetensors")
    assert set(rest.modules) == {"denoiser", "vae"}
    with pytest.raises(UserError, match="no text encoder"):
        sd3_jax.generate(rest, PROMPTS, **RUN)
    together = load(",".join(map(str, [tmp_path / "rest.safetensors", *files])))
    same_variables(load(whole), together)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    listed = [tmp_path / "rest.safetensors", *files]
    again = sd3_jax.load(listed, mesh, "float32", tokenizers_from=None)
    same_variables(again, together)


def folder_of(module, path):
    """A component as its library saves it."""
    module.save_pretrained(path)
    return path, next(path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["vae", "denoiser"])
def test_diffusers_file_of_a_component_alone(name, tmp_path):
    """Without its folder, as the users of other programs have it."""
    options = miniature.KINDS["sd35_medium"]
    made = miniature.vae() if name == "vae" else miniature.transformer(**options)
    folder, file = folder_of(made, tmp_path)
    whole, alone = load(folder), load(file)
    assert list(alone.modules) == [name]
    same_variables(whole, alone)
    if name == "vae":
        assert whole.latent_scale == alone.latent_scale


def test_the_same_with_the_names_of_comfyui(tmp_path):
    """As its CheckpointSave writes them: no prefix is that of Stability's files but
    the encoders', and each of those has a logit_scale."""
    whole = single(tmp_path)
    state = safetensors.torch.load_file(whole)
    renamed = {
        k.replace("model.diffusion_model.", "diffusion_model.").replace(
            "first_stage_model.", "vae."
        ): x
        for k, x in state.items()
    }
    for name in ("clip_l", "clip_g", "t5xxl"):
        renamed[f"text_encoders.{name}.logit_scale"] = torch.tensor(4.6055)
    safetensors.torch.save_file(renamed, tmp_path / "comfy.safetensors")
    same_variables(load(whole), load(tmp_path / "comfy.safetensors"))


def test_clip_g_in_open_clips_layout(tmp_path):
    """Its fused matrix is q, k and v in this order, its projection (in, out): so
    transformers' own converter reads it."""
    whole = single(tmp_path)
    state = safetensors.torch.load_file(whole)
    prefix = "text_encoders.clip_g.transformer."
    own = {k.removeprefix(prefix): state.pop(k) for k in list(state) if prefix in k}
    other = {
        "token_embedding.weight": own["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": own["text_model.embeddings.position_embedding.weight"],
        "text_projection": own["text_projection.weight"].T.contiguous(),
        "logit_scale": torch.tensor(4.6),
    }
    for kind in ("weight", "bias"):
        other[f"ln_final.{kind}"] = own[f"text_model.final_layer_norm.{kind}"]
        for i in range(3):
            theirs, ours = (
                f"transformer.resblocks.{i}",
                f"text_model.encoder.layers.{i}",
            )
            qkv = [own[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            other[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for a, b in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
                ("attn.out_proj", "self_attn.out_proj"),
            ):
                other[f"{theirs}.{a}.{kind}"] = own[f"{ours}.{b}.{kind}"]
    state |= {f"text_encoders.clip_g.{k}": x for k, x in other.items()}
    safetensors.torch.save_file(state, tmp_path / "open_clip.safetensors")
    same_variables(load(whole), load(tmp_path / "open_clip.safetensors"))


def test_eight_bits_without_scales_are_weights(tmp_path):
    """A checkpoint that was cast to fp8, as it is sold for small cards."""
    path = single(tmp_path)
    state = safetensors.torch.load_file(path)
    eight = {k: x.to(torch.float8_e4m3fn) for k, x in state.items()}
    safetensors.torch.save_file(eight, tmp_path / "fp8.safetensors")
    found = load(tmp_path / "fp8.safetensors").variables["denoiser"]["params"]["final"]
    wanted = eight["model.diffusion_model.final_layer.linear.weight"].float().numpy()
    np.testing.assert_array_equal(np.asarray(found["kernel"]).reshape(64, -1), wanted.T)
    scale = "model.diffusion_model.final_layer.linear.scale_weight"
    scaled = eight | {scale: torch.ones(()), "scaled_fp8": torch.zeros(2)}
    safetensors.torch.save_file(scaled, tmp_path / "scaled.safetensors")
    with pytest.raises(UserError, match="matrices in fp8 have no scale_weight"):
        load(tmp_path / "scaled.safetensors")


def test_eight_bit_t5(tmp_path):
    path = single(tmp_path)
    state = safetensors.torch.load_file(path)
    for key in state:
        if "t5xxl" in key:
            state[key] = state[key].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(state, path)
    bundle = load(path)
    assert set(bundle.file_dtypes["t5"].values()) == {"float8_e4m3fn"}
    shared = state["text_encoders.t5xxl.transformer.shared.weight"].float().numpy()
    found = bundle.variables["t5"]["params"]["embedding"]
    np.testing.assert_array_equal(found, shared)
    assert np.unique(shared.astype(ml_dtypes.float8_e4m3fn)).size <= 256


@one_kind
def test_without_t5(kind, tmp_path):
    """Zeros of the asked-for length in its place, as in diffusers."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        miniature.folder(kind), text_encoder_3=None, tokenizer_3=None
    )
    pipe.save_pretrained(tmp_path)
    bundle = load(tmp_path, tokenizers_from="")
    assert "t5" not in bundle.modules
    context, pooled = bundle.encode_prompts(PROMPTS, 30)
    theirs = pipe.encode_prompt(
        PROMPTS, None, None, max_sequence_length=30, do_classifier_free_guidance=False
    )
    assert convert.error(context, theirs[0]) < 2e-5
    assert convert.error(pooled, theirs[2]) < 2e-5
    assert not np.asarray(context)[:, 77:].any() and context.shape[1] == 107


@one_kind
@pytest.mark.parametrize("length", [77, 512])
@pytest.mark.parametrize("skip", [0, 1])
def test_encoded_prompts(bundle, kind, length, skip):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(miniature.folder(kind))
    texts = ["a red fox! in the rain " * 9, "Fox"]
    context, pooled = bundle.encode_prompts(texts, length, clip_skip=skip)
    theirs = pipe.encode_prompt(
        texts,
        None,
        None,
        clip_skip=skip or None,
        max_sequence_length=length,
        do_classifier_free_guidance=False,
    )
    assert convert.error(context, theirs[0]) < 1e-4
    assert convert.error(pooled, theirs[2]) < 2e-5


def test_a_picture_does_not_depend_on_mesh_or_company():
    folder = miniature.folder("sd35_medium")
    alone = sd3_jax.generate(load(folder), PROMPTS[0], **RUN | dict(seed=5))
    for axes in dict(fsdp=8), dict(data=2, fsdp=2, tensor=1, context=2):
        mesh = sharding.make_mesh(**axes)
        bundle = sd3_jax.load(str(folder), mesh=mesh, dtype="float32")
        many = sd3_jax.generate(bundle, PROMPTS * 4, **RUN | dict(seed=[5] * 8))
        assert convert.error(many[:1], np.asarray(alone)) < 1e-4
        assert convert.error(many[:2], np.asarray(many[2:4])) < 1e-5


def test_the_fingerprint_is_of_the_weights():
    folder = miniature.folder("sd35_medium")
    prints = set()
    for axes in dict(fsdp=8), dict(data=8, fsdp=1):
        mesh = sharding.make_mesh(**axes)
        prints.add(sd3_jax.load(str(folder), mesh, "float32").fingerprint())
    assert len(prints) == 1
    half = sd3_jax.load(str(folder), dtype="bfloat16").fingerprint()
    other = load(miniature.folder("sd3_medium")).fingerprint()
    assert len({half, other, *prints}) == 3


# Errors


def damaged(tmp_path, change):
    folder = miniature.folder("sd3_medium")
    state = safetensors.numpy.load_file(
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
    )
    change(state)
    (tmp_path / "config.json").write_text(
        (folder / "transformer" / "config.json").read_text()
    )
    safetensors.numpy.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    return tmp_path


def test_what_does_not_fit_is_listed(tmp_path):
    def change(state):
        del state["proj_out.bias"]
        state["proj_in.bias"] = np.zeros(3, np.float32)
        state["proj_out.weight"] = state["proj_out.weight"][:-1]

    with pytest.raises(UserError) as error:
        load(damaged(tmp_path, change))
    message = str(error.value)
    assert "1 missing, 1 extra, 1 of another shape" in message
    for name in ("proj_out.bias is missing", "proj_in.bias is not known"):
        assert name in message
    assert "proj_out.weight is [63, 64], expected [64, 64]" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, value):
    def change(state):
        state["proj_out.weight"] = state["proj_out.weight"].copy()
        state["proj_out.weight"][1, 2] = value

    words = "proj_out.weight holds values that are NaN or infinite"
    with pytest.raises(UserError, match=f"safetensors: {words}"):
        load(damaged(tmp_path, change))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("num_layers", None, "config.json: num_layers = null: expected a whole number"),
        ("patch_size", "two", 'config.json: patch_size = "two"'),
        ("dual_attention_layers", 3, "config.json: dual_attention_layers = 3"),
        ("_class_name", ["a", {}], "config.json is of"),
    ],
)
def test_a_configuration_that_lies(tmp_path, key, value, words):
    path = damaged(tmp_path, lambda state: None) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_no_more_than_ten_names(tmp_path):
    def change(state):
        for key in [k for k in state if "attn.to_q" in k or "ff.net" in k]:
            del state[key]

    with pytest.raises(UserError) as error:
        load(damaged(tmp_path, change))
    assert str(error.value).count("is missing") == 10 and " more" in str(error.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pth", "model.safetensors"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"a": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(UserError, match="is a pickle.*safetensors"):
        load(tmp_path / name)


def test_a_folder_of_pickles_is_refused(tmp_path):
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(words())
    pipe.transformer.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(UserError, match="is a pickle"):
        load(tmp_path)


def test_no_network_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the hub cannot be reached") as error:
        load("somebody/something")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source, message",
    [("no/such/path", "no such file"), ("nothing.safetensors", "no such file")],
)
def test_no_such_path(source, message):
    with pytest.raises(UserError, match=message):
        load(source)


def test_a_file_of_something_else(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"lora.up.weight": np.zeros((2, 2))}, path)
    with pytest.raises(UserError, match="not a model of this family"):
        load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(height=60), "height 60: expected a multiple of 16.*nearest is 64"),
        (dict(width=16_000), "width 16000: expected a multiple of 16, at most 384"),
        (dict(solver="eular"), 'solver "eular"; did you mean "euler"'),
        (dict(output="image"), 'did you mean "images"'),
        (
            dict(max_sequence_length=513),
            "max_sequence_length 513: expected a whole number 1 to 512",
        ),
        (dict(seed=-1), "seed -1"),
        (dict(negative_prompts=["a", "b", "c"]), "3 negative prompts for 2"),
        (dict(negative_prompts="\ud800"), "prompt: .ud800 at character 1"),
        (dict(negative_prompts=8193 * "a"), "prompt: 8193 characters"),
        (dict(skip_layers=[4]), "skip_layers 4: expected a whole number 0 to 3"),
        (dict(mask=np.zeros((1, 64, 64, 1))), "mask without image"),
        (dict(images_per_prompt=0), "images_per_prompt 0"),
        (dict(clip_skip=7), "clip_skip 7"),
        (
            dict(latents=np.zeros((1, 8, 8, 4))),
            "latents of shape .1, 8, 8, 4.: expected .b, h, w, 16.",
        ),
    ],
)
def test_mistakes_are_told(change, message):
    bundle = load(words())
    with pytest.raises((UserError, ValueError), match=message):
        sd3_jax.generate(bundle, PROMPTS, **RUN | change)


def test_configs_are_kept_in_single_files(tmp_path):
    path = tmp_path / "a.safetensors"
    sd3_jax.save(load(words()), path, "original")
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    assert json.loads(metadata["sd3_jax"])["scheduler"]["shift"] == 3.0
    assert metadata["sd3_jax_fuller"] == "clip_l"  # its projection is not the identity
    state = safetensors.torch.load_file(path)
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    safetensors.torch.save_file(state, path, metadata)
    with pytest.raises(UserError, match="clip_l: 1 missing, .*text_projection.weight"):
        load(path)
