"""Open a model's file: safetensors or GGUF, known by its first bytes."""

from etils import epath

from sd3_jax.errors import UserError
from sd3_jax.weights import gguf_files, gguf_header, safetensors
from sd3_jax.weights.stored_tensor import Tensors


def open_file(path: epath.PathLike) -> tuple[Tensors, dict[str, str]]:
    """(tensors by name, metadata) of one file; values are not read."""
    path = epath.Path(path)
    if gguf_header.is_gguf(path):
        return gguf_files.open_file(path), {}
    if path.suffix == ".gguf" and path.exists():
        raise UserError(
            f"{path}: not a GGUF file, or damaged: it does not begin with GGUF;"
            " download it again"
        )
    return safetensors.open_file(path)
