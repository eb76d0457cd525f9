"""A whole CLIP against transformers: both towers, and what prepares pictures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from parity import convert, miniature
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sd3_jax.data import clip_images
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.evaluation import clip_embedder
from sd3_jax.weights import clip_keys as weights
from sd3_jax.weights import components, key_mapping

SIZE = miniature.CLIP_SIZE
TEXTS = ["a red fox in the rain", "Foxes, 3 of them!", ""]


@pytest.fixture(scope="module")
def folder():
    return miniature.whole_clip()


def pictures():
    rng = np.random.default_rng(0)
    shapes = ((40, 61), (55, 33), (28, 28), (9, 12), (31, 30), (64, 64))
    return [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in shapes]


def theirs(folder):
    return transformers.CLIPModel.from_pretrained(folder).eval()


def test_both_towers_embed_as_theirs(folder):
    ours, wanted = clip_embedder.load(str(folder), rows=1), theirs(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    x = processor([Image.fromarray(p) for p in pictures()], return_tensors="pt")
    with torch.inference_mode():
        images = wanted.get_image_features(**x).pooler_output
    assert convert.error(ours.image(pictures()), images) < 1e-5
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        texts = wanted.get_text_features(**ids).pooler_output
    assert convert.error(ours.text(TEXTS), texts) < 1e-5
    assert ours.image([]).shape == (0, 24)


def test_pictures_are_prepared_as_by_their_processor(folder):
    prepare = clip_images.preparation(folder_of(folder), SIZE)
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    for picture in pictures():
        found = prepare([picture])
        wanted = processor([Image.fromarray(picture)], return_tensors="np")
        wanted = wanted["pixel_values"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def folder_of(path):
    return clip_embedder.epath.Path(path)


def test_a_file_alone_is_read_as_openais(folder, tmp_path):
    """That is of known widths; others are refused for want of a config.json."""
    (tmp_path / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match="width 48.*config.json"):
        clip_embedder.load(str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="no config.json"):
        clip_embedder.load(str(tmp_path))


def test_a_tower_that_is_missing_is_named(folder, tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match="vision tower: num_hidden_layers = 3: expected 2"
    ):
        clip_embedder.load(str(tmp_path))
    config["vision_config"].update(num_hidden_layers=2, image_size=35)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="position_embedding.*expected"):
        clip_embedder.load(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text('{"do_center_crop": false}')
    with pytest.raises(UserError, match="do_center_crop"):
        clip_images.preparation(folder_of(tmp_path), SIZE)


FULL = {  # openai/clip-vit-large-patch14
    "text_config": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12)
    | dict(num_attention_heads=12, eos_token_id=2),
    "vision_config": dict(hidden_size=1024, intermediate_size=4096, patch_size=14)
    | dict(num_hidden_layers=24, num_attention_heads=16),
    "projection_dim": 768,
}


def test_full_size_is_theirs_one_to_one():
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**FULL))
    wanted = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    del wanted["logit_scale"]
    configs, found, count = weights.towers(model.config.to_dict()), {}, 0
    mesh = sharding.make_mesh(fsdp=2, data=4)
    for name, component in weights.TOWERS.items():
        module = component.build(configs[name], jnp.float32)
        shapes = components.abstract(component, module, configs[name], mesh, "float32")
        pieces = key_mapping.pieces(shapes, component.table(module), "diffusers")
        found |= {piece.key: piece.file_shape for piece in pieces}
        count += sum(x.size for x in jax.tree.leaves(shapes))
        tensors = {k: torch.empty(v, device="meta") for k, v in found.items()}
        own = {k: x for k, x in tensors.items() if k.startswith(("visual", "vision"))}
        own = (
            own
            if name == "vision"
            else {k: tensors[k] for k in tensors if k not in own}
        )
        told = components.configured(component, None, own)
        assert component.build(told, jnp.float32) == module
    assert found == wanted
    assert count == 427_616_512
