"""A file of one component with the caller's configuration; CLIPs with a narrow
projection, which diffusers pads to the width of the context alone."""

import json

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from parity import convert, miniature
from parity.test_controls import refused
from parity.test_pipelines import nchw, nhwc, one_device

import sd3_jax
from sd3_jax.tools.parity import tiny_tokenizers
from sd3_jax.weights import caller_configs
from sd3_jax.weights.components import COMPONENTS

KIND = "sd35_large"
LATENTS = np.random.default_rng(0).standard_normal((2, 4, 6, 16)).astype(np.float32)


def load(path, **options):
    options = dict(dtype="float32", tokenizers_from=None) | options
    return sd3_jax.load(str(path), one_device(), **options)


def same(one, other, name):
    jax.tree.map(
        np.testing.assert_array_equal, one.variables[name], other.variables[name]
    )


@pytest.fixture(scope="module")
def folder():
    return miniature.folder(KIND)


@pytest.fixture(scope="module")
def whole(folder):
    return load(folder)


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("of", ["dictionary", "file", "folder", "pipeline"])
def test_a_bare_file_with_diffusers_configuration(name, of, folder, whole):
    """Both CLIPs are 64 wide, so that no width tells which one it is."""
    component = COMPONENTS[name]
    place = folder / component.folder
    config = {
        "dictionary": json.loads((place / "config.json").read_text()),
        "file": place / "config.json",
        "folder": str(place),
        "pipeline": folder,
    }[of]
    (file,) = place.glob("*.safetensors")
    only = {component.folder} if of != "file" else name
    bundle = load(file, only=only, config=config)
    assert list(bundle.modules) == [name]
    assert bundle.modules[name] == whole.modules[name]
    same(bundle, whole, name)


def test_a_denoiser_whose_heads_no_shape_tells(tmp_path):
    model = miniature.randomise(
        diffusers.SD3Transformer2DModel(
            **dict(sample_size=32, num_layers=2, attention_head_dim=16),
            **dict(num_attention_heads=4, joint_attention_dim=160, in_channels=16),
            **dict(caption_projection_dim=64, pooled_projection_dim=128),
            pos_embed_max_size=24,
        )
    ).eval()
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    bundle = load(file, only={"transformer"}, config=model.config)
    draw = np.random.default_rng(1).standard_normal
    context, pooled = draw((2, 20, 160)), draw((2, 128))
    context, pooled = np.float32(context), np.float32(pooled)
    t = np.array([0.8, 0.2], np.float32)
    with torch.no_grad():
        wanted = model(
            nchw(LATENTS),
            timestep=1000 * torch.tensor(t),
            encoder_hidden_states=torch.tensor(context),
            pooled_projections=torch.tensor(pooled),
            return_dict=False,
        )[0]
    v = bundle.velocity(LATENTS, t, context, pooled)
    assert convert.error(v, nhwc(wanted)) < 1e-4
    guessed = load(file).velocity(LATENTS, t, context, pooled)  # one head of 64
    assert convert.error(guessed, nhwc(wanted)) > 1e-3


def test_names_and_configurations_that_are_refused(folder, tmp_path):
    place = folder / "transformer"
    (file,) = place.glob("*.safetensors")
    config = json.loads((place / "config.json").read_text())
    ask = lambda said, path=file, **options: refused(said, load, path, **options)
    ask(
        'only: component "transformr"; did you mean "transformer"?', only={"transformr"}
    )
    ask(
        'only: component "denoizer"; did you mean "denoiser"?', only=["denoizer", "vae"]
    )
    said = "only 3: expected names of components"
    refused(said, caller_configs.component_names, 3)
    ask(
        'not of 2 of 1; name it, such as only={"tr',
        only={"transformer", "vae"},
        config=config,
    )
    ask("not of 5 of 1; name it", config=config)
    ask("has no vae, of which config is", only="vae", config=folder / "vae")
    said = "config 3: expected a dictionary"
    refused(said, caller_configs.read_config, 3, COMPONENTS["denoiser"])
    said = "expected a config.json, or a folder with one, or with transformer/config.js"
    ask(said, only="transformer", config=tmp_path)
    ask(
        "num_layers = 5: expected 4, because",
        only="transformer",
        config=config | dict(num_layers=5),
    )
    said = "has configurations of its own, config.json; leave config out"
    ask(said, place, only="transformer", config=config)
    said = '_class_name = "AutoencoderKL": expected "SD3Transformer2DModel"'
    ask(said, only="transformer", config=folder / "vae")


# CLIPs whose projection is narrower than they are


def narrow_clip(activation, seed):
    config = transformers.CLIPTextConfig(
        **dict(vocab_size=tiny_tokenizers.CLIP_VOCAB, hidden_size=64),
        **dict(intermediate_size=96, projection_dim=24, num_hidden_layers=3),
        **dict(num_attention_heads=1, hidden_act=activation, eos_token_id=2),
        **dict(bos_token_id=0, pad_token_id=1),
    )
    return miniature.randomise(transformers.CLIPTextModelWithProjection(config), seed)


@pytest.fixture(scope="module")
def narrow(folder, tmp_path_factory):
    """A pipeline whose CLIPs are 64 wide and whose pooled vectors have 24 channels."""
    transformer = miniature.randomise(
        diffusers.SD3Transformer2DModel(
            **dict(sample_size=32, num_layers=2, attention_head_dim=64),
            **dict(num_attention_heads=1, joint_attention_dim=160, in_channels=16),
            **dict(caption_projection_dim=64, pooled_projection_dim=48),
            pos_embed_max_size=24,
        )
    )
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder,
        transformer=transformer,
        text_encoder=narrow_clip("quick_gelu", 2),
        text_encoder_2=narrow_clip("gelu", 3),
    )
    pipe.set_progress_bar_config(disable=True)
    path = tmp_path_factory.mktemp("narrow")
    pipe.save_pretrained(path)
    return pipe, path


def test_clips_with_a_narrow_projection_are_as_in_diffusers(narrow):
    pipe, path = narrow
    bundle = sd3_jax.load(str(path), one_device(), "float32")
    texts = ["a red fox", "in the rain"]
    context, pooled = bundle.encode_prompts(texts, 20)
    options = dict(max_sequence_length=20, do_classifier_free_guidance=False)
    theirs = pipe.encode_prompt(texts, None, None, **options)
    assert context.shape == (2, 97, 160) and pooled.shape == (2, 48)
    assert np.asarray(context)[:, :77, 48:128].any()  # beyond pooled's channels
    assert convert.error(context, theirs[0]) < 1e-4
    assert convert.error(pooled, theirs[2]) < 1e-4
    size = dict(height=32, width=48)
    wanted = pipe(
        texts,
        **size,
        num_inference_steps=2,
        guidance_scale=5.0,
        max_sequence_length=20,
        latents=nchw(LATENTS),
        output_type="latent",
    ).images
    run = dict(size, steps=2, guidance=5.0, max_sequence_length=20, latents=LATENTS)
    latents = sd3_jax.generate(bundle, texts, **run, output="latents")
    assert convert.error(latents, nhwc(wanted)) < 1e-4


def test_a_narrow_clip_g_needs_clip_l(narrow):
    _, path = narrow
    said = "the width of the missing clip_l is not known, because clip_g's hidden_size"
    refused(said, load, path, only=("denoiser", "clip_g"))
