"""Low-rank factors of a kernel in the published layouts, by the models' key tables.

The tables map kernels. a and b are mapped as kernels too: the rank is a's output axis
and b's input axis.
"""

from collections.abc import Callable

import numpy as np
from flax import linen as nn

from sd3_jax.params import lora
from sd3_jax.weights import key_mapping
from sd3_jax.weights.components import COMPONENTS
from sd3_jax.weights.key_mapping import Kind, Piece, Row

Path = tuple[str, ...]
PLAIN = (
    key_mapping.LINEAR,
    key_mapping.SWAPPED,
    key_mapping.MERGING,
    key_mapping.AS_IS,
)


def zeros(path: Path, shape: tuple, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, turned b) of zeros for a kernel of this shape in the module at `path`."""
    first, second = lora.layout(path, len(shape)).shapes(shape, rank)
    a, b = np.zeros(first, np.float32), np.zeros(second, np.float32)
    return a, turn(path, a, b)


def turn(path: Path, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """b with groups and rank exchanged, if it has groups; its own inverse.

    In the tables a kernel's inputs, here the rank, come before the maps that it fuses.
    """
    axes = lora.layout_of(path, {"a": a})
    return np.swapaxes(b, axes.layers, axes.layers + 1) if axes.groups else b


def pieces(
    name: str, module: nn.Module, path: Path, sides: tuple, layout: str
) -> tuple[list[Piece], list[Piece]]:
    """Tensors of a layout for a and turned b of the kernel in the module at `path`."""
    # The component's own table, with the kinds of rows changed for a and for b.
    groups = COMPONENTS[name].table(module)
    parts = []
    for x, change in zip(sides, (_first, _second)):
        table = [
            group._replace(rows=[_changed(row, change) for row in group.rows])
            for group in groups
        ]
        leaves = lora.nested({("params", *path, "kernel"): x})
        tensors = key_mapping.pieces(leaves, table, layout)
        # Without a key: a map that the layout lacks, such as CLIP-L's projection.
        parts.append([piece for piece in tensors if piece.key is not None])
    return parts[0], parts[1]


def layer(piece: Piece) -> str:
    """The name of the layer whose weight a piece is."""
    return piece.key.removesuffix(".weight")


def _changed(row: Row, change: Callable[[Kind], Kind]) -> Row:
    other = row.original_kind
    return row._replace(
        kind=change(row.kind), original_kind=None if other is None else change(other)
    )


def _first(kind: Kind) -> Kind:
    """Kind of lora_A, whose outputs are the rank: there are no halves to exchange."""
    return kind._replace(swap=False)


def _second(kind: Kind) -> Kind:
    """Kind of lora_B; a convolution's has (out, rank, 1, 1), a 1 x 1 convolution."""
    return kind if kind in PLAIN else key_mapping.CONV_1X1
