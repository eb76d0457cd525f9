"""Pictures as CLIP's vision tower takes them: transformers' CLIPImageProcessor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import parse_json, shown

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of the pictures it trained on
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number, as in preprocessor_config.json
THREADS = 8  # that resize


class Preparation(NamedTuple):
    """How pictures become a tower's input, as CLIPImageProcessor does it."""

    size: int = 224  # the shorter side is resized to it
    crop: int = 224  # then the middle, square, is cut out
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    resample: int = BICUBIC

    def __call__(
        self, pictures: Sequence[UInt8[ndarray, "_ _ 3"]] | UInt8[ndarray, "n _ _ 3"]
    ) -> Float[ndarray, "n s s 3"]:
        """In float32; pictures of any shapes."""
        if len(pictures) == 0:
            return np.zeros((0, self.crop, self.crop, 3), np.float32)
        with ThreadPoolExecutor(THREADS) as threads:
            made = np.stack(list(threads.map(self._one, pictures)))  # uint8
        x = made.astype(np.float32) * np.float32(1 / 255)
        return (x - np.float32(self.mean)) / np.float32(self.std)

    def _one(self, picture: ndarray) -> ndarray:
        image = Image.fromarray(picture)
        short, long = sorted(image.size)
        other = int(self.size * long / short)  # cut off, not rounded, as theirs is
        sides = (
            (self.size, other) if image.width <= image.height else (other, self.size)
        )
        x = np.asarray(image.resize(sides, Image.Resampling(self.resample)))
        top, left = ((side - self.crop) // 2 for side in x.shape[:2])
        return x[top : top + self.crop, left : left + self.crop]


def preparation(folder: epath.Path, size: int) -> Preparation:
    """As the folder's preprocessor_config.json says; OpenAI's where there is none."""
    given = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            given = read_json(folder / name)
            given = given.get("image_processor", given)
    told = lambda name, default: given.get(name) or default
    try:
        made = Preparation(
            _side(told("size", size), "shortest_edge"),
            _side(told("crop_size", size), "height"),
            tuple(map(float, told("image_mean", MEAN))),
            tuple(map(float, told("image_std", STD))),
            int(given.get("resample", BICUBIC)),
        )
        Image.Resampling(made.resample)
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{folder}: preprocessor_config.json: {error!r}") from None
    undone = [k for k in given if k.startswith("do_") and given[k] is False]
    if made.crop != size or made.size < size or undone:
        raise UserError(
            f"{folder}: preprocessor_config.json: size {made.size}, crop {made.crop}"
            f" {' '.join(undone)}: wanted pictures resized and cropped to {size} pixels"
        )
    return made


def read_json(path: epath.Path) -> dict:
    """A JSON object of other hands; or a UserError."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {shown(error, 200)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object")
    return value


def _side(given: Any, key: str) -> int:
    return int(given[key] if isinstance(given, dict) else given)
