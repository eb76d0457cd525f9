"""The miniature pipelines as folders, made once and kept in the tests' cache."""

import os
import shutil
from pathlib import Path

from sd3_jax.parity import tiny_tokenizers  # noqa: F401
from sd3_jax.parity.miniature import (  # noqa: F401
    KINDS,
    clip,
    pipeline,
    t5,
    transformer,
    vae,
)

ROOT = Path(__file__).parents[1] / ".cache" / "miniature"
VERSION = "2"  # of the pipelines: another makes the folders anew


def folder(kind: str) -> Path:
    """A diffusers folder of the kind."""
    path = ROOT / f"{kind}-{VERSION}"
    if not path.exists():
        partial = Path(f"{path}.{os.getpid()}")
        pipeline(kind, partial).save_pretrained(partial)
        try:
            partial.rename(path)
        except OSError:  # another process was first
            shutil.rmtree(partial)
    return path
