"""Preparing pictures for CLIP's vision tower, as transformers' CLIPImageProcessor."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax import files
from sd3_jax.errors import UserError

MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's, of the pictures it trained on
STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number, as in preprocessor_config.json
THREADS = 8  # that resize: Pillow releases the GIL


class Preparation(NamedTuple):
    """Resize, crop and normalize pictures for a vision tower."""

    size: int = 224  # the shorter side is resized to it
    crop: int = 224  # then the middle, square, is cut out
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    resample: int = BICUBIC

    def __call__(
        self, pictures: Sequence[UInt8[ndarray, "_ _ 3"]] | UInt8[ndarray, "n _ _ 3"]
    ) -> Float[ndarray, "n s s 3"]:
        """Prepare pictures of any shapes; float32."""
        if len(pictures) == 0:
            return np.zeros((0, self.crop, self.crop, 3), np.float32)
        with ThreadPoolExecutor(THREADS) as threads:
            cropped = np.stack(list(threads.map(self._one, pictures)))  # uint8
        # A product, as in transformers: a division by 255 rounds to other last bits.
        x = cropped.astype(np.float32) * np.float32(1 / 255)
        return (x - np.float32(self.mean)) / np.float32(self.std)

    def _one(self, picture: ndarray) -> ndarray:
        image = Image.fromarray(picture)
        short, long = sorted(image.size)
        scaled = int(self.size * long / short)  # truncated, as in transformers
        is_tall = image.width <= image.height
        sides = (self.size, scaled) if is_tall else (scaled, self.size)
        x = np.asarray(image.resize(sides, Image.Resampling(self.resample)))
        top, left = ((side - self.crop) // 2 for side in x.shape[:2])
        return x[top : top + self.crop, left : left + self.crop]


def preparation(folder: epath.Path, size: int) -> Preparation:
    """Read a folder's preprocessor_config.json; without one OpenAI's settings."""
    # processor_config.json, of newer transformers, nests the same settings; the older
    # file wins where a folder has both.
    settings = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            settings = files.read_object(folder / name)
            settings = settings.get("image_processor", settings)
    setting = lambda name, default: settings.get(name) or default
    try:
        parsed = Preparation(
            _side(setting("size", size), "shortest_edge"),
            _side(setting("crop_size", size), "height"),
            tuple(map(float, setting("image_mean", MEAN))),
            tuple(map(float, setting("image_std", STD))),
            int(settings.get("resample", BICUBIC)),
        )
        Image.Resampling(parsed.resample)
    except (TypeError, ValueError, LookupError) as error:
        raise UserError(f"{folder}: preprocessor_config.json: {error!r}") from None
    # Options are checked, not ignored: "do_normalize": false would give other features.
    disabled = [k for k in settings if k.startswith("do_") and settings[k] is False]
    if parsed.crop != size or parsed.size < size or disabled:
        raise UserError(
            f"{folder}: preprocessor_config.json: size {parsed.size}, crop"
            f" {parsed.crop} {' '.join(disabled)}: expected pictures resized and"
            f" cropped to {size} pixels"
        )
    return parsed


def _side(value: Any, key: str) -> int:
    """A size that is a number, or a dict as in newer versions of transformers."""
    return int(value[key] if isinstance(value, dict) else value)
