"""What is told before a model's weights are read: tokenizers, parts of other models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd3_jax
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.weights import (
    components,
    key_mapping,
    published_configs,
    safetensors,
    sharded_load,
    sources,
)
from sd3_jax.weights.safetensors import Entry

CLIP = dict(hidden_size=64, intermediate_size=64, num_attention_heads=1)
CLIP |= dict(num_hidden_layers=2, projection_dim=64, hidden_act="gelu", eos_token_id=2)
T5 = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
T5 |= dict(feed_forward_proj="gated-gelu", vocab_size=32128)


def write(path, **parts):
    """A single file of ones, with its configurations."""
    mesh, entries = sharding.make_mesh(devices=jax.devices()[:1]), {}
    for name, config in parts.items():
        component = components.COMPONENTS[name]
        module = component.build(config, jnp.float32)
        shapes = components.abstract(component, module, config, mesh, "float32")
        for p in key_mapping.pieces(shapes, component.table(module), "original"):
            if p.key is not None:
                ones = np.broadcast_to(np.float32(1), p.file_shape)
                entry = Entry(ones.dtype, ones.shape, lambda ones=ones: ones)
                entries[component.prefix + p.key] = entry
    safetensors.write_file(path, entries, {"sd3_jax": json.dumps(parts)})
    return str(path)


@pytest.fixture
def unread(monkeypatch):
    """No weights are read, and nothing is fetched."""

    def read(*args, **options):
        raise AssertionError("weights are read")

    monkeypatch.setattr(sharded_load, "load", read)
    resolve = sources.resolve

    def offline(source, *args, **options):
        if source.startswith("google"):
            raise UserError(f"{source} cannot be had from the hub")
        return resolve(source, *args, **options)

    monkeypatch.setattr(sources, "resolve", offline)


@pytest.mark.parametrize(
    "name, config, words",
    [
        (
            "clip_g",
            CLIP | {"vocab_size": 300},
            "no tokenizer for clip_g, whose 300 row",
        ),
        ("t5", T5, r"no tokenizer for t5 \(google-t5/t5-small cannot be had"),
        ("t5", T5 | {"vocab_size": 60}, "no tokenizer for t5, whose 60 rows"),
    ],
)
def test_a_missing_tokenizer_is_told_first(name, config, words, tmp_path, unread):
    path = write(tmp_path / "a.safetensors", **{name: config})
    with pytest.raises(UserError, match=f"{path}: {words}.*tokenizers_from=FOLDER"):
        sd3_jax.load(path)


def test_who_gives_embeddings_needs_none(tmp_path):
    path = write(tmp_path / "a.safetensors", clip_g=CLIP | {"vocab_size": 300})
    bundle = sd3_jax.load(path, tokenizers_from=None)
    assert "clip_g" in bundle.modules and bundle.tokenizers == {}
    with pytest.raises(UserError, match="has no tokenizer for clip_g"):
        bundle.token_ids(["a red fox"], 77)


def test_a_single_file_of_clip_needs_nothing(tmp_path):
    path = write(tmp_path / "a.safetensors", clip_g=CLIP)
    ids = sd3_jax.load(path).token_ids(["a photo of a cat"], 77)["ids_clip_g"]
    wanted = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[0].tolist() == wanted + 70 * [0]


DENOISER = dict(in_channels=16, joint_attention_dim=160, pooled_projection_dim=128)


@pytest.mark.parametrize(
    "part, config, words",
    [
        (
            "clip_l",
            dict(hidden_size=768, projection_dim=64),
            "of both CLIPs is 832",
        ),
        (
            "clip_l",
            dict(hidden_size=64, projection_dim=96),
            "of both CLIPs is 160",
        ),
        ("t5", dict(d_model=4096), "t5 is of another model: d_model = 4096"),
        (
            "vae",
            dict(latent_channels=4),
            "vae is of another model: latent_channels = 4",
        ),
    ],
)
def test_parts_of_different_models_are_told(part, config, words):
    whole = dict(denoiser=DENOISER, clip_g=CLIP)
    published_configs.fit(whole | {"clip_l": CLIP}, "a")
    with pytest.raises(UserError, match=f"a: .*{words}.* must be .*the denoiser"):
        published_configs.fit(whole | {part: config}, "a")
    published_configs.fit({part: config}, "a")  # alone it is of any
