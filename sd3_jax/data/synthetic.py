"""Noise in the shape of precomputed records, for benchmarks, plans and tiny recipes."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Synthetic:
    """Latents (n, h/8, w/8, c), context (n, l, k) and pooled (n, e), standard normal.

    `pairs` adds rejected_latents, for preferences; `sets` alternates between two sets.
    """

    height: int
    width: int
    channels: int
    text_length: int
    context_dim: int
    pooled_dim: int
    seed: int = 0
    pairs: bool = False
    sets: bool = False

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = [self.example(int(i)) for i in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def names(self, indices: np.ndarray) -> list[str]:
        """The examples with these indices, for messages: "synthetic:104"."""
        return [f"synthetic:{int(i)}" for i in indices]

    def identity(self) -> dict[str, Any]:
        """A flat, short summary of the data, for a checkpoint to compare on resume."""
        # Options that are off are left out: checkpoints of before they existed compare
        # equal.
        settings = asdict(self)
        optional = {k: v for k in ("pairs", "sets") if (v := settings.pop(k))}
        return {"name": "synthetic", **settings, **optional}

    def example(self, i: int) -> dict[str, np.ndarray]:
        # Seeded by example, so that any process can make any row.
        rng = np.random.default_rng((self.seed, i))
        shapes = {
            "latents": (self.height // 8, self.width // 8, self.channels),
            "context": (self.text_length, self.context_dim),
            "pooled": (self.pooled_dim,),
        }
        if self.pairs:
            shapes["rejected_latents"] = shapes["latents"]
        tensors = {
            name: rng.standard_normal(shape, np.float32)
            for name, shape in shapes.items()
        }
        return tensors | ({"set": np.int32(i % 2)} if self.sets else {})
