"""Exports in the layouts that other tools read: encoders and ControlNets."""

import json
from types import SimpleNamespace

import diffusers
import jax
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from parity import convert, miniature
from parity.test_controls import refused
from parity.test_numerics import ARGS, LATENTS, bundle, residuals_of, theirs  # noqa: F401
from parity.test_pipelines import control_net, one_device, original_names

import sd3_jax
from sd3_jax import main
from sd3_jax.weights import text_keys

PREFIXES = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g")}
PREFIXES["t5"] = "text_encoders.t5xxl.transformer."
ENCODERS = {
    "clip_l": miniature.clip("quick_gelu", 2),
    "clip_g": miniature.clip("gelu", 3),
    "t5": miniature.t5(),
}
READ_BY_STABILITY = {  # text models of their own, by the names in other_impls.py
    "clip_l": "text_projection.weight",
    "clip_g": "text_projection.weight",
    "t5": "encoder.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def encoders():
    folder = str(miniature.folder("sd35_large"))
    options = dict(dtype="float32", tokenizers_from=None, only=PREFIXES)
    return sd3_jax.load(folder, mesh=one_device(), **options)


def test_encoders_have_every_tensor_that_their_libraries_have(encoders, tmp_path):
    """As transformers names them, whose models hold both names of T5's embedding."""
    path = tmp_path / "a.safetensors"
    sd3_jax.save(encoders, path, "original")
    tensors = safetensors.torch.load_file(path)
    for name, prefix in PREFIXES.items():
        own = {k.removeprefix(prefix): x for k, x in tensors.items() if prefix in k}
        state = ENCODERS[name].state_dict()
        assert own.keys() == {k for k in state if "position_ids" not in k}
        assert READ_BY_STABILITY[name] in own
        assert all(torch.equal(own[key], state[key]) for key in own)
    again = sd3_jax.load(str(path), one_device(), "float32", tokenizers_from=None)
    jax.tree.map(np.testing.assert_array_equal, encoders.variables, again.variables)


def test_the_projection_of_a_published_file_is_written_as_the_identity(
    encoders, tmp_path, caplog
):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sd3_jax.save(encoders, first, "original")
    said = (
        "clip_l's text_projection/kernel is not the identity; ComfyUI and Stability's"
    )
    assert said in caplog.text
    caplog.clear()
    tensors = safetensors.torch.load_file(first)
    projection = PREFIXES["clip_l"] + text_keys.PROJECTION
    del tensors[projection], tensors[PREFIXES["t5"] + text_keys.EMBED_TOKENS]
    safetensors.torch.save_file(tensors, first)  # without our metadata
    load = lambda path: sd3_jax.load(
        str(path), one_device(), "float32", tokenizers_from=None
    )
    published = load(first)
    sd3_jax.save(published, second, "original")
    assert not caplog.text
    written = safetensors.torch.load_file(second)
    assert torch.equal(written[projection], torch.eye(64))
    assert written.keys() - tensors.keys() == {
        projection,
        PREFIXES["t5"] + text_keys.EMBED_TOKENS,
    }
    again = load(second).variables
    jax.tree.map(np.testing.assert_array_equal, published.variables, again)


def net_of(kind, **options):
    pipe = SimpleNamespace(transformer=miniature.transformer(qk_norm="rms_norm"))
    return control_net(pipe, kind, **options).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["joint", "dual", "single"])
def test_a_control_net_in_both_layouts(kind, bundle, theirs, tmp_path):  # noqa: F811
    net = net_of(kind)
    net.save_pretrained(tmp_path / "first")
    ours = sd3_jax.load_control(str(tmp_path / "first"), bundle)
    original = tmp_path / "net.safetensors"
    sd3_jax.save(ours, original, "original")
    # --- the names that other tools know, and their values
    written, state = safetensors.torch.load_file(original), net.state_dict()
    named = original_names(state) if kind == "single" else state
    assert written.keys() == named.keys()
    assert all(torch.equal(written[k], named[k]) for k in named)
    # --- read back without any config.json, and written for diffusers
    again = sd3_jax.load_control(str(original), bundle)
    assert again.module == ours.module and again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.variables, ours.variables)
    sd3_jax.save(again, tmp_path / "folder", "diffusers")
    read = diffusers.SD3ControlNetModel.from_pretrained(tmp_path / "folder").eval()
    wanted = residuals_of(read, 0.5 * LATENTS, theirs)
    control = sd3_jax.ControlInput(again, 0.5 * LATENTS, scale=0.7)
    residuals = bundle.control_residuals(*ARGS, control=control)
    for mine, other in zip(residuals, wanted):
        assert convert.error(mine, other) < 1e-4
    path = tmp_path / "no"
    refused('"orbax" holds no ControlNet', sd3_jax.save, ours, path, "orbax")


def test_convert_writes_a_joint_control_net_in_both_layouts(tmp_path):
    net_of("joint").save_pretrained(tmp_path / "net")
    recipe = ("convert", "--config=configs/released.py:tiny", f"--workdir={tmp_path}")
    source = tmp_path / "net"
    for layout, out in (("original", "a.safetensors"), ("diffusers", "again")):
        flags = dict(weights=source, **{"convert.to": layout})
        flags |= {"convert.out": tmp_path / out}
        assert (
            main.main([*recipe, *(f"--config.{k}={x}" for k, x in flags.items())]) == 0
        )
        source = tmp_path / out
    one, other = (
        safetensors.torch.load_file(next((tmp_path / x).glob("*.safetensors")))
        for x in ("net", "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    one, other = (
        json.loads((tmp_path / x / "config.json").read_text()) for x in ("net", "again")
    )
    assert one.items() <= other.items()


def test_what_shapes_do_not_tell_of_a_control_net_is_in_its_metadata(
    bundle,  # noqa: F811
    tmp_path,
):
    net = net_of("joint")
    net.register_to_config(force_zeros_for_pooled_projection=False)
    net.save_pretrained(tmp_path / "folder")
    ours = sd3_jax.load_control(str(tmp_path / "folder"), bundle)
    path = tmp_path / "a.safetensors"
    sd3_jax.save(ours, path, "original")
    assert not sd3_jax.load_control(str(path), bundle).module.zero_pooled
    with safetensors.safe_open(path, "np") as file:
        config = json.loads(file.metadata()["sd3_jax"])["controlnet"]
    assert config["force_zeros_for_pooled_projection"] is False
