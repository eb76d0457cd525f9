"""The miniature pipelines as folders, made once and kept in the tests' cache."""

import os
import shutil
from pathlib import Path

import transformers

from sd3_jax.tools.parity import tiny_tokenizers
from sd3_jax.tools.parity.miniature import (  # noqa: F401
    KINDS,
    clip,
    pipeline,
    randomise,
    t5,
    transformer,
    vae,
)

ROOT = Path(__file__).parents[1] / ".cache" / "miniature"
VERSION = "2"  # of the pipelines: another makes the folders anew


CLIP_SIZE = 28  # pixels a side of what the miniature CLIP sees


def folder(kind: str) -> Path:
    """A diffusers folder of the kind."""
    return kept(kind, lambda path: pipeline(kind, path).save_pretrained(path))


def whole_clip() -> Path:
    """A CLIPModel's folder, with its tokenizer and how it prepares pictures."""
    return kept("clip", save_clip)


def save_clip(path: Path) -> None:
    tiny_tokenizers.save(path)
    words = transformers.AutoTokenizer.from_pretrained(path / "tokenizer")
    words.save_pretrained(path)
    shared = dict(num_hidden_layers=2, intermediate_size=96, projection_dim=24)
    text = dict(hidden_size=64, num_attention_heads=2, eos_token_id=2)
    text |= dict(vocab_size=tiny_tokenizers.CLIP_VOCAB, bos_token_id=0, pad_token_id=1)
    vision = dict(hidden_size=48, num_attention_heads=3, image_size=28, patch_size=7)
    config = transformers.CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=24
    )
    randomise(transformers.CLIPModel(config), 7).save_pretrained(path)
    size = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    made = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIZE}, crop_size=size
    )
    made.save_pretrained(path)


def kept(name: str, save) -> Path:
    """What `save(path)` makes of a new folder, made once."""
    path = ROOT / f"{name}-{VERSION}"
    if not path.exists():
        partial = Path(f"{path}.{os.getpid()}")
        save(partial)
        try:
            partial.rename(path)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return path
