"""Feature extractors behind one interface, for FID, KID, precision and recall."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from numpy import ndarray

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown


@dataclass(frozen=True)
class Extractor:
    """Called with u8 pictures (n, h, w, 3), gives float32 features (n, dim).

    `name` and `fingerprint` identify the extractor in files of statistics. `dim` is
    None if only the features show it.
    """

    name: str
    fingerprint: str
    extract: Callable[[UInt8[ndarray, "n h w 3"]], Any]
    dim: int | None = None

    def __call__(self, images: UInt8[ndarray, "n h w 3"]) -> Float32[ndarray, "n d"]:
        """A UserError if `extract` gives anything else."""
        features = np.asarray(self.extract(images))
        # The function may be the user's, so its result is checked in full.
        wide = features.shape[1:] == (self.dim,) if self.dim else features.ndim == 2
        if not wide or len(features) != len(images) or features.dtype.kind != "f":
            raise UserError(
                f"{self.name}: returned {features.dtype} of shape {features.shape} for"
                f" {len(images)} pictures; expected float32 of shape ({len(images)},"
                f" {self.dim or 'd'})"
            )
        # NaN in a feature makes FID NaN; here the extractor can still be named.
        if not np.isfinite(features).all():
            raise UserError(f"{self.name}: returned numbers that are not finite")
        return features.astype(np.float32)


def pixels(images: UInt8[ndarray, "n h w 3"]) -> Float32[ndarray, "n d"]:
    """The pictures themselves in [0, 1], flat: for toy sets."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


PIXELS = Extractor("pixels", "1", pixels)


def of_torchscript(path: epath.PathLike) -> Extractor:
    """The TorchScript file of Inception with which StyleGAN and others compute FID.

    Its module takes u8 (n, 3, h, w), whatever h and w, and with `return_features=True`
    gives (n, 2048). PyTorch runs it, on the CPU.
    """
    path = epath.Path(path)
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path}: TorchScript needs PyTorch, which is not installed; run pip"
            ' install -e ".[torch]" in the checkout'
        ) from None
    try:
        with path.open("rb") as file:
            # Hashed by content: statistics made with another copy of the file are
            # comparable.
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
            file.seek(0)
            model = torch.jit.load(file, map_location="cpu").eval()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except RuntimeError as error:
        reason = shown(str(error).splitlines()[0], 120)
        raise UserError(f"{path}: {reason}; expected a file of TorchScript") from None

    def extract(images):
        # (n, h, w, 3) → (n, 3, h, w). The module resizes by itself, as its features
        # depend on how that is done.
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        try:
            with torch.inference_mode():
                return model(x, return_features=True).float().numpy()
        except RuntimeError as error:
            reason = shown(str(error).strip().splitlines()[-1], 120)
            wanted = "expected Inception's, which takes (images, return_features=True)"
            raise UserError(f"{path}: failed: {reason}; {wanted}") from error

    return Extractor(path.name, digest, extract)
