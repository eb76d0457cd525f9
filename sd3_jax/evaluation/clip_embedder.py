"""CLIP with both towers: pictures and texts to embeddings in one space."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from numpy import ndarray

from sd3_jax import files, tree
from sd3_jax.data import clip_images, tokenizers
from sd3_jax.distributed import sharding
from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.sampling import compiled
from sd3_jax.weights import components, key_mapping, safetensors, sharded_load, sources
from sd3_jax.weights.clip_keys import SIDES, TOWERS, towers

WANTED = ("*.json", "*.safetensors", "*.txt")  # of a hub's repository


@dataclass(frozen=True, repr=False)
class Clip:
    """Both towers over a mesh; `image` and `text` embed, `prepare` runs on the host."""

    modules: dict[str, nn.Module]  # "vision" and "text"
    variables: dict[str, dict]
    prepare: clip_images.Preparation
    tokenizer: Any  # None: texts cannot be embedded
    mesh: Mesh
    source: str
    rows: int = 8  # a device at a time

    @property
    def dim(self) -> int:
        return self.modules["vision"].projection

    def image(
        self, pictures: Sequence[UInt8[ndarray, "_ _ 3"]] | UInt8[ndarray, "n _ _ 3"]
    ) -> Float[ndarray, "n e"]:
        """Projected embeddings, not normalised, of this process's pictures."""
        return self._batched("vision", pictures, self.prepare)

    def text(self, texts: Sequence[str]) -> Float[ndarray, "n e"]:
        """Projected embeddings, not normalised; a long text is cut at 77 tokens."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.source}: no CLIP tokenizer; put its vocab.json and merges.txt"
                " beside the weights, or set config.tokenizers"
            )
        length = self.modules["text"].length
        ids = lambda batch: tokenizers.token_ids(
            self.tokenizer, batch, length, encoder="CLIP"
        )
        return self._batched("text", texts, ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vision tower's weights and of how pictures are prepared."""
        # The preparation is part of it: other resampling moves FID as other weights do.
        weights = tree.fingerprint(self.variables["vision"])
        description = f"{weights} {self.modules['vision']} {self.prepare}"
        return hashlib.sha256(description.encode()).hexdigest()[:12]

    def _batched(self, tower, inputs, prepare) -> ndarray:
        """Embeddings in batches of one size; the last is padded with its first row."""
        # No more rows than there are inputs: a small set would otherwise be mostly
        # padding.
        size = min(self.rows, -(-len(inputs) // sharding.batch_shards(self.mesh)))
        size = max(1, size) * sharding.batch_shards(self.mesh)
        # So that no inputs give (0, e) and not an error.
        done = [np.zeros((0, self.dim), np.float32)]
        for start in range(0, len(inputs), size):
            batch = list(inputs[start : start + size])
            x = prepare(batch)
            # The last batch is filled up, so that all batches run one compiled program.
            x = np.concatenate([x, np.repeat(x[:1], size - len(x), axis=0)])
            with compiled.on(self.mesh):
                embeddings = embed(
                    self.modules[tower],
                    self.variables[tower],
                    compiled.place(x, self.mesh),
                )
            done.append(np.asarray(embeddings, np.float32)[: len(batch)])
        return np.concatenate(done)


@jax.jit(static_argnames="module")
def embed(module: nn.Module, variables: dict, x: jax.Array) -> jax.Array:
    # The vision tower returns embeddings, the text tower (states, embeddings).
    outputs = module.apply(variables, x)
    return (
        outputs if isinstance(outputs, jax.Array) else outputs[1]
    )  # a text's pooled vector


def load(source: str, *, tokenizers_from: str = "", rows: int = 8) -> Clip:
    """A folder of transformers' CLIPModel, one .safetensors of it, or a hub name.

    Weights are float32, replicated over this process's devices: CLIP is small, and
    processes embed their shares without waiting for each other.
    `tokenizers_from` is a folder or hub name of a released model or a tokenizer, for a
    file without one beside it. A UserError says what is missing.
    """
    path = sources.resolve(source, WANTED)
    devices = jax.local_devices()
    # Local devices only: a global mesh would make every embedding a collective, and the
    # processes embed different numbers of pictures.
    mesh = sharding.make_mesh(data=len(devices), fsdp=1, devices=devices)
    tensors, configs = _open_checkpoint(path)
    modules, variables = {}, {}
    for name, component in TOWERS.items():
        tower_tensors = {
            k: x for k, x in tensors.items() if k.startswith(SIDES) == (name != "text")
        }
        label = f"{path}: CLIP's {name} tower"
        # One tensor that every such tower has.
        if component.mark not in tower_tensors:
            raise UserError(
                f"{label} is missing; expected a whole CLIPModel of transformers"
            )
        config = components.configured(
            component, configs[name] if configs else None, tower_tensors, where=label
        )
        module = component.build(config, np.dtype("float32"))
        shapes = components.abstract(component, module, config, mesh, "float32")
        # One file holds both towers; the key prefix tells whose a tensor is.
        pieces = key_mapping.pieces(shapes, component.table(module), "diffusers")
        sharded_load.check(
            tower_tensors, pieces, where=label, ignored=component.ignored
        )
        modules[name], variables[name] = (
            module,
            sharded_load.load(tower_tensors, shapes, pieces),
        )
    folder = path if path.is_dir() else path.parent
    prepare = clip_images.preparation(folder, modules["vision"].size)
    words = _tokenizer(folder, tokenizers_from, modules["text"].vocab)
    return Clip(modules, variables, prepare, words, mesh, source, rows)


def _open_checkpoint(path: epath.Path) -> tuple[safetensors.Tensors, dict | None]:
    """The tensors, and the towers' configurations if there is a config.json."""
    if not path.is_dir():
        return safetensors.open_file(path)[0], None
    if not (path / "config.json").exists():
        raise UserError(
            f"{path}: no config.json; expected a folder with a CLIPModel of"
            " transformers, such as openai/clip-vit-large-patch14, or its .safetensors"
        )
    config = files.read_object(path / "config.json")
    # A text encoder's folder has a config.json as well, but no vision tower.
    if "vision_config" not in config:
        kind = shown(config.get("model_type", "another model"))
        raise UserError(f"{path}: config.json is of {kind}, expected a CLIPModel")
    return safetensors.open_folder(path), towers(config, f"{path / 'config.json'}")


def _tokenizer(folder: epath.Path, other: str, words: int) -> Any:
    """The tokenizer beside the weights, that of a released model's first encoder, or
    the package's if the tower has as many `words`."""
    places = [folder]
    if other:
        wanted = tokenizers.WANTED
        places.append(sources.resolve(other, wanted, label="tokenizers"))
    # The tokenizer beside the weights comes first, then that of another model, then the
    # package's, if the vocabulary sizes match.
    for place in places:
        if any((place / name).exists() for name in ("vocab.json", "tokenizer.json")):
            return tokenizers.read("clip_l", place)
        if tokenizer := tokenizers.load(place).get("clip_l"):
            return tokenizer
    return (
        tokenizers.packaged_clip("clip_l") if words == tokenizers.CLIP_WORDS else None
    )
