"""Embeddings of pictures: SSCD (arXiv 2202.10261), as in the paper, or a function.

An embedding maps RGB pictures, (h, w, 3) uint8 each, to (n, d) float32; pictures are
compared by cosine.
"""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown

SSCD_SIDE = 320  # its README's choice for batches: squares, whatever the aspect
SSCD_MEAN, SSCD_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class SSCD:
    """An SSCD model from a TorchScript file; most give (n, 512) float32.

    SSCD("sscd_disc_mixup.torchscript.pt")(pictures) runs on the CPU.
    """

    def __init__(self, path: epath.PathLike):
        torch, path = _torch(), epath.Path(path)
        try:
            with path.open("rb") as file:
                self._model = torch.jit.load(file, map_location="cpu").eval()
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path}: cannot be read: {reason}") from None
        except RuntimeError as error:  # torch.jit's, many lines of C++ frames
            raise UserError(
                f"{path}: {shown(str(error).splitlines()[0], 120)}; expected a file of"
                " TorchScript, such as sscd_disc_mixup.torchscript.pt"
            ) from None

    def __call__(
        self, pictures: Sequence[UInt8[ndarray, "_ _ 3"]]
    ) -> Float32[ndarray, "n d"]:
        torch = _torch()
        batch = np.stack([_square(picture) for picture in pictures])  # (n, 3, s, s)
        with torch.inference_mode():
            embeddings = self._model(torch.from_numpy(batch))
        return embeddings.float().numpy()


def embedded(
    embed: Callable, pictures: Sequence[UInt8[ndarray, "_ _ 3"]], name: str
) -> Float32[ndarray, "n d"]:
    """Call a user's embedding; UserError if it fails or does not give floats (n, d)."""
    try:
        embeddings = np.asarray(embed(pictures))
    except MemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
        raise UserError(f"{name} failed: {shown(failure, 200)}") from error
    n, shape, dtype = len(pictures), embeddings.shape, embeddings.dtype
    if len(shape) != 2 or shape[0] != n or dtype.kind != "f":
        raise UserError(
            f"{name}: returned {dtype} of shape {shape} for {n} pictures; expected"
            f" float32 of shape ({n}, d)"
        )
    if not np.isfinite(embeddings).all():
        raise UserError(f"{name}: returned numbers that are not finite")
    return embeddings.astype(np.float32)


def _square(picture):
    # Squeezed, not cropped: all of a picture is compared, and batches are one array.
    size = SSCD_SIDE, SSCD_SIDE
    image = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    x = (np.asarray(image, np.float32) / 255 - SSCD_MEAN) / SSCD_STD
    return x.transpose(2, 0, 1).astype(np.float32)


def _torch():
    # Imported late: sd3_jax runs without PyTorch, and importing it takes seconds.
    try:
        import torch
    except ImportError:
        raise UserError(
            "SSCD needs PyTorch, which is not installed; run pip install"
            ' -e ".[torch]" in the checkout'
        ) from None
    return torch
