"""TAESD3 against diffusers' AutoencoderTiny, with random weights, and its files."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from parity import convert, miniature

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.models.tiny_autoencoder import TinyAutoencoder
from sd3_jax.sampling.text.prompts import Conditioning
from sd3_jax.weights import tiny_autoencoder_keys

SOURCE = "sd35_medium"
BLOCKS = dict(num_encoder_blocks=(1, 2, 1, 1), num_decoder_blocks=(1, 1, 2, 1))


def tiny(latent_channels=16, **options):
    model = diffusers.AutoencoderTiny(latent_channels=latent_channels, **options)
    return convert.randomise(model, 3).eval()


@pytest.fixture(scope="module")
def theirs():
    return tiny()  # the published sizes


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("taesd3")
    theirs.save_pretrained(path)
    return path


def loaded(*sources, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    sources = [str(x) for x in sources]
    return sd3_jax.load(sources, mesh, "float32", tokenizers_from=None, **options)


@pytest.fixture(scope="module")
def bundle(folder):
    return loaded(folder)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def original(theirs):
    """{half: tensors} in the names of the author's files, from the layers' order."""
    halves = {}
    for half, shift in ("encoder", 0), ("decoder", 1):  # the decoder's Clamp
        part = getattr(theirs, half).layers.state_dict()
        number = lambda key, shift=shift: int(key.split(".")[0]) + shift
        halves[half] = {
            ".".join([str(number(key)), *key.split(".")[1:]]): x.contiguous()
            for key, x in part.items()
        }
    return halves


@pytest.mark.parametrize("sides", [(5, 3), (1, 1), (6, 8)])
def test_the_decoded_image(theirs, bundle, sides):
    z = np.random.default_rng(0).normal(size=(2, *sides, 16)).astype(np.float32) * 3
    expected = nhwc(theirs.decode(nchw(z)).sample)
    images = bundle.decode(z)
    assert convert.error(images, np.clip(expected / 2 + 0.5, 0, 1)) < 5e-5
    run = bundle.modules["vae"].apply
    whole = run(bundle.variables["vae"], jnp.asarray(z), method="decode")
    assert convert.error(whole, expected) < 5e-5


@pytest.mark.parametrize("sides", [(40, 24), (8, 8)])
def test_the_latents_of_an_image(theirs, bundle, sides):
    image = np.random.default_rng(1).random((2, *sides, 3)).astype(np.float32)
    expected = nhwc(theirs.encode(nchw(2 * image - 1)).latents)
    assert convert.error(bundle.encode_image(image), expected) < 5e-5
    # Nothing is drawn.
    drawn = bundle.encode_image(image, jax.random.key(0))
    np.testing.assert_array_equal(drawn, bundle.encode_image(image))


def test_other_numbers_of_blocks(tmp_path):
    theirs = tiny(**BLOCKS)
    theirs.save_pretrained(tmp_path)
    z = np.random.default_rng(2).normal(size=(1, 4, 4, 16)).astype(np.float32)
    expected = np.clip(nhwc(theirs.decode(nchw(z)).sample) / 2 + 0.5, 0, 1)
    assert convert.error(loaded(tmp_path).decode(z), expected) < 5e-5


@pytest.mark.parametrize("name", ["two files", "one file", "diffusers"])
def test_files(theirs, bundle, tmp_path, name):
    halves = original(theirs)
    if name == "two files":  # ComfyUI's vae_approx
        for half, tensors in halves.items():
            path = tmp_path / f"taesd3_{half}.safetensors"
            safetensors.torch.save_file(tensors, path)
    elif name == "one file":
        path = tmp_path / "taesd3.safetensors"
        tensors = {
            f"taesd_{half}.{key}": x
            for half, part in halves.items()
            for key, x in part.items()
        }
        # ComfyUI's module has two parameters more (nodes.py sets them for each family).
        tensors |= {"vae_scale": torch.tensor(1.5305)}
        tensors |= {"vae_shift": torch.tensor(0.0609)}
        safetensors.torch.save_file(tensors, path)
    else:
        path = tmp_path / "diffusion_pytorch_model.safetensors"
        safetensors.torch.save_file(theirs.state_dict(), path)
    again = loaded(path)
    assert again.configs["vae"]["latent_channels"] == 16
    jax.tree.map(np.testing.assert_array_equal, again.variables, bundle.variables)


def test_round_trips(bundle, theirs, tmp_path):
    sd3_jax.save(bundle, tmp_path / "folder", "diffusers")
    read = diffusers.AutoencoderTiny.from_pretrained(tmp_path / "folder" / "vae")
    for key, x in theirs.state_dict().items():
        assert torch.equal(x, read.state_dict()[key]), key
    sd3_jax.save(bundle, tmp_path / "one.safetensors", "original")
    again = loaded(tmp_path / "one.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.variables, bundle.variables)


def test_pictures_and_previews_of_a_model(theirs, folder, bundle):
    """As in diffusers' pipeline with `pipe.vae = taesd3`: latents are not rescaled."""
    model = loaded(miniature.folder(SOURCE), folder, only=["denoiser", "vae"])
    assert isinstance(model.modules["vae"], TinyAutoencoder)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        miniature.folder(SOURCE), vae=theirs
    )
    seen = {}
    draw = np.random.default_rng(4).normal
    configs = model.configs["denoiser"]
    context = draw(size=(1, 90, configs["joint_attention_dim"]))
    pooled = draw(size=(1, configs["pooled_projection_dim"]))
    context, pooled = np.float32(context), np.float32(pooled)
    noise = np.float32(draw(size=(1, 4, 6, 16)))
    expected = pipe(
        prompt_embeds=torch.tensor(context),
        pooled_prompt_embeds=torch.tensor(pooled),
        latents=nchw(noise),
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="np",
        height=32,
        width=48,
    ).images
    images = sd3_jax.generate(
        model,
        Conditioning(context, pooled),
        latents=noise,
        steps=2,
        guidance=1,
        preview=lambda i, t, rgb: seen.update({int(i): np.array(rgb)}),
        preview_decoder=bundle,
    )
    jax.effects_barrier()
    assert convert.error(images, expected) < 1e-4
    # The last preview is of the result.
    assert seen.keys() == {0, 1}
    np.testing.assert_allclose(seen[1], images, atol=1e-6)


def test_mistakes(theirs, bundle, folder, tmp_path):
    # --- of another family
    tiny(4, **BLOCKS).save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="latent_channels = 4; must be 16"):
        loaded(miniature.folder(SOURCE), tmp_path / "four", only=["denoiser", "vae"])
    model = loaded(miniature.folder(SOURCE), only=["denoiser", "vae"])
    four = loaded(tmp_path / "four")
    run = dict(height=32, width=32, preview=print)
    with pytest.raises(UserError, match="its latents have 4 channels.*TAESD3"):
        sd3_jax.generate(model, "a", preview_decoder=four, **run)
    with pytest.raises(UserError, match="preview_decoder without preview"):
        sd3_jax.generate(model, "a", preview_decoder=bundle)
    # --- half of it
    halves = original(theirs)
    safetensors.torch.save_file(halves["decoder"], tmp_path / "decoder.safetensors")
    with pytest.raises(UserError, match="decoder of a TAESD alone.*encoder.safetens"):
        loaded(tmp_path / "decoder.safetensors")
    # --- what it cannot do
    with pytest.raises(UserError, match="without a variance"):
        bundle.posterior(np.zeros((1, 8, 8, 3), np.float32))
    config = json.loads((folder / "config.json").read_text())
    for name, value in {"act_fn": "mish", "scaling_factor": 0.13}.items():
        (tmp_path / "bad").mkdir(exist_ok=True)
        text = json.dumps(config | {name: value})
        (tmp_path / "bad" / "config.json").write_text(text)
        (tmp_path / "bad" / "model.safetensors").write_bytes(
            (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        )
        with pytest.raises(UserError, match=f"{name} = .*nothing else"):
            loaded(tmp_path / "bad")


def test_the_table_names_every_leaf(theirs):
    module = TinyAutoencoder()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    table = tiny_autoencoder_keys.table(module)
    convert.from_torch(shapes, table, theirs.state_dict())
