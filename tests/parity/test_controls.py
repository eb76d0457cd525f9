"""Hints of ControlNets against diffusers' autoencoder, their files, their mistakes."""

import dataclasses
import json
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.image_processor import VaeImageProcessor
from parity import convert, miniature
from parity.test_pipelines import control_net, nchw, nhwc, one_device, original_names
from PIL import Image

import sd3_jax
from sd3_jax import main
from sd3_jax.errors import UserError
from sd3_jax.params.adapters import Full
from sd3_jax.sampling import bundle_loading, control_arguments
from sd3_jax.sampling.adapters.adapter_bank import Bank
from sd3_jax.sampling.control import ControlBundle
from sd3_jax.sampling.text.prompts import Conditioning

KIND = "sd35_large"
SIZE = dict(height=32, width=48)
SHAPE = (4, 6, 16)  # of the latents
GRID = np.linspace(1, 0, 5, dtype=np.float32)
HINT = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
MASK = np.zeros((32, 48), bool)
MASK[8:24] = True
EDGES = np.where(HINT[..., :1] > 200, np.uint8(255), np.uint8(0)).repeat(3, -1)
ZEROS = np.zeros((1, *SHAPE), np.float32)


@pytest.fixture(scope="module")
def bundle():
    parts = ("denoiser", "vae")
    folder = str(miniature.folder(KIND))
    return bundle_loading.load(folder, mesh=one_device(), dtype="float32", only=parts)


@pytest.fixture(scope="module")
def pipe():
    """As much of a pipeline as control_net looks at."""
    return SimpleNamespace(transformer=miniature.transformer(qk_norm="rms_norm"))


@pytest.fixture(scope="module")
def theirs():
    return miniature.vae().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tensors(pipe):
    """Of a single-stream net in Stability's names."""
    return original_names(control_net(pipe, "single").state_dict())


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory):
    """The published three, and one that does not say what it is, by control_type."""
    folder = tmp_path_factory.mktemp("controls")
    made = {None: folder / "none.safetensors"}
    safetensors.torch.save_file(tensors, made[None])
    for number, name in enumerate(("blur", "canny", "depth")):
        told = {"control_type": torch.tensor([number], dtype=torch.int32)}
        made[name] = folder / f"{name}.safetensors"
        safetensors.torch.save_file(tensors | told, made[name])
    return made


@pytest.fixture(scope="module")
def net(bundle, files):
    return sd3_jax.load_control(str(files["canny"]), bundle)


class SD3CannyImageProcessor(VaeImageProcessor):
    """The one that SD3.5-large's canny net is published with."""

    def __init__(self):
        super().__init__(do_normalize=False)

    def preprocess(self, image, **kwargs):
        return super().preprocess(image, **kwargs) * 255 * 0.5 + 0.5


def wanted_hint(theirs, processor, picture):
    mean = theirs.encode(processor.preprocess(picture)).latent_dist.mean
    return nhwc((mean - theirs.config.shift_factor) * theirs.config.scaling_factor)


def hint(bundle, net, image, **options):
    control = sd3_jax.ControlInput(net, image, **options)
    _, arrays = control_arguments.controls_of(bundle, [control], GRID, SHAPE, 1, 1)
    return np.asarray(arrays[0][1])


@pytest.mark.parametrize(
    "kind, picture, processor",
    [
        ("canny", EDGES, SD3CannyImageProcessor()),
        ("blur", HINT, VaeImageProcessor()),
        ("depth", HINT, VaeImageProcessor()),
        (None, HINT, VaeImageProcessor()),
    ],
)
def test_the_hint_is_diffusers(kind, picture, processor, bundle, files, theirs):
    net = sd3_jax.load_control(str(files[kind]), bundle)
    assert net.config.get("control_type") == kind
    wanted = wanted_hint(theirs, processor, Image.fromarray(picture))
    assert convert.error(hint(bundle, net, picture), wanted) < 1e-5
    told = hint(bundle, net, picture, preprocess=kind or "plain")
    np.testing.assert_array_equal(told, hint(bundle, net, Image.fromarray(picture)))


def test_preprocess_replaces_what_the_file_says(bundle, files, net, theirs):
    other = sd3_jax.load_control(str(files[None]), bundle)
    canny = hint(bundle, net, EDGES)
    np.testing.assert_array_equal(hint(bundle, other, EDGES, preprocess="canny"), canny)
    plain = hint(bundle, net, EDGES, preprocess="plain")
    wanted = wanted_hint(theirs, VaeImageProcessor(), Image.fromarray(EDGES))
    assert convert.error(plain, wanted) < 1e-5
    assert convert.error(canny, wanted) > 1
    turned = hint(bundle, other, HINT, preprocess="inverted")
    np.testing.assert_allclose(turned, hint(bundle, other, 255 - HINT), atol=1e-5)


def test_an_inpainting_nets_hint(bundle, pipe, theirs, tmp_path):
    net = control_net(pipe, "joint", extra_conditioning_channels=1)
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["extra_conditioning_channels"]  # as it is published
    (tmp_path / "config.json").write_text(json.dumps(config))
    net = sd3_jax.load_control(str(tmp_path), bundle)
    left = nchw(2 * np.where(MASK[..., None], 0, HINT / 255)[None] - 1).float()
    mean = theirs.encode(left).latent_dist.mean
    mean = (mean - theirs.config.shift_factor) * theirs.config.scaling_factor
    keep = 1.0 - MASK[None, ::8, ::8, None]
    wanted = np.concatenate([nhwc(mean), keep], -1)
    for mask in (MASK, Image.fromarray(MASK), 255 * MASK.astype(np.uint8)):
        assert convert.error(hint(bundle, net, HINT, mask=mask), wanted) < 1e-5
    refused("repaints; give a mask", hint, bundle, net, HINT)
    more = dict(mask=MASK, preprocess="canny")
    refused("an inpainting ControlNet has none", hint, bundle, net, HINT, **more)


def test_control_type_is_kept(bundle, files, tensors, tmp_path):
    """By convert, to diffusers' folder and back, and by save."""
    recipe = "--config=configs/released.py:tiny"
    step = lambda source, to, out: main.main(
        [
            *("convert", recipe, f"--workdir={tmp_path}", f"--config.weights={source}"),
            *(f"--config.convert.to={to}", f"--config.convert.out={out}"),
        ]
    )
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert step(files["canny"], "diffusers", folder) == 0
    assert step(folder, "original", back) == 0
    assert step(back, "orbax", tmp_path / "no") == 2
    net = sd3_jax.load_control(str(folder), bundle)
    sd3_jax.save(net, tmp_path / "saved.safetensors", "original")
    for path in (back, tmp_path / "saved.safetensors"):
        found = safetensors.torch.load_file(path)
        assert found.pop("control_type").tolist() == [1]
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
    read = diffusers.SD3ControlNetModel.from_pretrained(folder)
    assert read.config.num_layers == 2
    assert net.config["control_type"] == "canny"


def test_an_adapter_of_the_embedding_that_a_net_borrows(bundle, files, net):
    adapted = dataclasses.replace(bundle, bank=Bank())
    draw = lambda *shape: np.random.default_rng(0).standard_normal(shape, np.float32)
    shape = bundle.variables["denoiser"]["params"]["patch_embed"]["kernel"].shape
    delta = Full(0.1 * draw(*shape))
    adapted.load_adapter({"denoiser": {("patch_embed", "kernel"): delta}}, "patches")
    merged = adapted.merge_adapters()
    text = Conditioning(draw(1, 9, 160), draw(1, 128))
    run = dict(height=32, width=32, steps=1, guidance=1, output="latents")

    def paint(bundle, net):
        control = sd3_jax.ControlInput(net, ZEROS[:, :4, :4])
        return np.asarray(sd3_jax.generate(bundle, text, control=control, **run))

    wanted = paint(merged, sd3_jax.load_control(str(files["canny"]), merged))
    assert convert.error(paint(adapted, net), wanted) < 1e-5
    assert convert.error(paint(merged, net), wanted) > 1e-3


def test_a_net_keeps_its_weights_beside_a_denoiser_of_eight_bits(files, net):
    options = dict(mesh=one_device(), dtype="float32", only=("denoiser", "vae"))
    quantize = {"denoiser": "int8_dynamic"}
    folder = str(miniature.folder(KIND))
    eight = bundle_loading.load(folder, quantize=quantize, **options)
    beside = sd3_jax.load_control(str(files["canny"]), eight)
    jax.tree.map(np.testing.assert_array_equal, beside.variables, net.variables)


def refused(said, function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def small(**sizes):
    """A ControlNet of its own sizes, as diffusers saves it."""
    usual = dict(
        sample_size=32,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=160,
        caption_projection_dim=64,
        pooled_projection_dim=128,
        pos_embed_max_size=24,
    )
    return diffusers.SD3ControlNetModel(**usual | sizes)


SINGLE = dict(joint_attention_dim=None, pos_embed_type=None, use_pos_embed=False)
WIDE = dict(num_attention_heads=2, caption_projection_dim=128)


@pytest.mark.parametrize(
    "sizes, said",
    [
        (
            WIDE,
            "a joint ControlNet that does not fit this denoiser, an SD3 transformer:",
        ),
        (WIDE, "width 128 against 64; use a ControlNet for the same model"),
        (
            WIDE | SINGLE,
            "a single-stream (SD3.5-large's) ControlNet that does not fit this",
        ),
        (dict(joint_attention_dim=96), "joint_attention_dim 96 against 160"),
        (dict(pooled_projection_dim=64), "pooled_projection_dim 64 against 128"),
        (dict(num_layers=5), "5 layers against 4"),
        (dict(patch_size=4), "patch 4 against 2"),
    ],
)
def test_a_net_of_another_model(sizes, said, bundle, tmp_path):
    small(**sizes).save_pretrained(tmp_path)
    refused(said, sd3_jax.load_control, str(tmp_path), bundle)


def test_another_family(bundle, tmp_path):
    named = {
        "controlnet_x_embedder.weight": "a ControlNet of FLUX or Qwen-Image; exp",
        "controlnet_cond_embedding.conv_in.weight": "a ControlNet of SD1.5, SD2 or S",
        "control_model.zero_convs.0.0.weight": "a ControlNet of SD1.5, SD2 or S",
        "joint_blocks.0.x": "a denoiser; expected a ControlNet of SD3 or SD3.5",
        "fox": "holds fox, …; expected a ControlNet of SD3 or SD3.5",
    }
    file = tmp_path / "x.safetensors"
    for name, said in named.items():
        safetensors.torch.save_file({name: torch.ones(2, 2)}, file)
        refused(said, sd3_jax.load_control, str(file), bundle)
    folder = tmp_path / "flux"
    small().save_pretrained(folder)
    config = folder / "config.json"
    text = config.read_text().replace("SD3ControlNetModel", "FluxControlNetModel")
    config.write_text(text)
    said = "config.json is of FluxControlNetModel; expected SD3ControlNetModel"
    refused(said, sd3_jax.load_control, str(folder), bundle)


@pytest.mark.parametrize("value", [[3], [-1], [0.5], [0, 1], []])
def test_control_types_that_are_none(value, bundle, tensors, tmp_path):
    file = tmp_path / "x.safetensors"
    told = {"control_type": torch.tensor(value)}
    safetensors.torch.save_file(tensors | told, file)
    said = "expected 0 (blur), 1 (canny) or 2 (depth)"
    refused(said, sd3_jax.load_control, str(file), bundle)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(image=HINT[:16]),
            "an image of (16, 48) pixels: must equal the size of the picture, (32, 48)",
        ),
        (
            dict(image=HINT.astype(np.float32)),
            "control 0's image: floats from 0 to 255",
        ),
        (dict(image=HINT.transpose(2, 0, 1)), "x.transpose(1, 2, 0)"),
        (dict(image=ZEROS.repeat(3, 0)), "3 of control 0's images for 1 pictures: exp"),
        (dict(image=ZEROS.transpose(0, 3, 1, 2)), "x.transpose(0, 2, 3, 1)"),
        (
            dict(image=ZEROS[:, :2]),
            "latents of (2, 6): must equal those of the picture, (4, 6)",
        ),
        (dict(image=ZEROS + np.nan), "control 0's latents: holds values that are NaN"),
        (dict(image=ZEROS, preprocess="canny"), "preprocess acts on pictures"),
        (dict(preprocess="cany"), 'preprocess "cany"; did you mean "canny"?'),
        (dict(mask=MASK), "takes no mask"),
        (dict(scale=np.nan), "scale nan: expected a finite number"),
        (dict(start=0.5, stop=0.2), "from start 0.5 to stop 0.2: expected shares"),
        (
            dict(net="canny.safetensors"),
            "expected ControlInput(net, image), with the net",
        ),
    ],
)
def test_controls_that_are_refused(options, said, bundle, net):
    control = sd3_jax.ControlInput(net, HINT)._replace(**options)
    refused(said, control_arguments.controls_of, bundle, [control], GRID, SHAPE, 1, 1)


def test_nets_that_do_not_go_together(bundle, net, pipe, tmp_path):
    small(num_layers=3).save_pretrained(tmp_path)
    other = sd3_jax.load_control(str(tmp_path), bundle)
    both = [sd3_jax.ControlInput(x, ZEROS) for x in (net, other)]
    said = "ControlNets of 2, 3 layers together: all must have the same number"
    refused(said, control_arguments.controls_of, bundle, both, GRID, SHAPE, 1, 1)
    foreign = ControlBundle(other.module.clone(width=128), {}, other.config)
    alone = [sd3_jax.ControlInput(foreign, ZEROS)]
    said = "control 0: a joint ControlNet that does not fit this denoiser"
    refused(said, control_arguments.controls_of, bundle, alone, GRID, SHAPE, 1, 1)
    large = (4, 50, 16)  # beyond a table of 24 positions
    control = [sd3_jax.ControlInput(other, np.zeros((1, *large), np.float32))]
    said = "control 0: the ControlNet's pictures have 384 pixels a side at most"
    refused(said, control_arguments.controls_of, bundle, control, GRID, large, 1, 1)


COND = Conditioning(np.zeros((1, 80, 160), np.float32), np.zeros((1, 128), np.float32))
BAD = np.full((1, 32, 48, 3), 200.0)


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(image=BAD), "image: floats from 200 to 200; expected 0 to 1"),
        (
            dict(image=ZEROS.transpose(0, 3, 1, 2)),
            "image of shape (1, 16, 4, 6): expected",
        ),
        (dict(latents=ZEROS.transpose(0, 3, 1, 2)), "x.transpose(0, 2, 3, 1)"),
        (dict(latents=ZEROS * np.nan), "latents: holds values that are NaN or inf"),
        (dict(image=HINT[:17]), "image of 17 x 48 pixels: expected sides that are"),
        (
            dict(prompts=COND._replace(pooled=COND.pooled + np.nan)),
            "prompts: pooled: h",
        ),
        (dict(prompts=COND._replace(pooled=COND.pooled[:, 1:])), "expected (b, 128)"),
        (dict(prompts=COND._replace(context=COND.context[0])), "(b, tokens, 160)"),
        (
            dict(prompts=COND._replace(context=COND.context[[0, 0]])),
            "2 rows and pooled",
        ),
        (
            dict(negative_prompts=COND._replace(context=COND.context + np.inf)),
            "negative_prompts: context: holds values that are NaN",
        ),
        (
            dict(image=HINT, mask=MASK[:16]),
            "mask of (16, 48) pixels: must equal the size",
        ),
        (dict(image=HINT, mask=MASK.astype(np.uint8)), "bytes of 0 and 1"),
    ],
)
def test_requests_that_are_refused(options, said, bundle):
    plain = dict(prompts=COND, negative_prompts=COND)
    refused(said, sd3_jax.generate, bundle, **plain | options)


def test_decode_and_velocity_say_how_latents_lie(bundle):
    wrong = ZEROS.transpose(0, 3, 1, 2)
    refused("x.transpose(0, 2, 3, 1)", bundle.decode, wrong)
    t = np.ones(1, np.float32)
    refused("x.transpose(0, 2, 3, 1)", bundle.velocity, wrong, t, *COND)


def test_one_picture_in_any_form_has_the_same_latents(bundle):
    wanted = np.asarray(bundle.encode_image(HINT[None].astype(np.float32) / 255))
    traced = jax.jit(bundle.encode_image)
    with jax.set_mesh(bundle.mesh):
        np.testing.assert_allclose(traced(HINT), wanted, atol=1e-5)
    for given in (HINT, HINT[None], Image.fromarray(HINT), [Image.fromarray(HINT)]):
        np.testing.assert_array_equal(bundle.encode_image(given), wanted)
