"""Report in which forms a component's tensors are stored, and what became of them."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

from sd3_jax import tree
from sd3_jax.params import parametrization
from sd3_jax.params.quantization import KINDS, Quantized
from sd3_jax.weights.key_mapping import Piece
from sd3_jax.weights.sharded_load import keeps
from sd3_jax.weights.stored_tensor import QuantizedTensor, Tensors

log = logging.getLogger(__name__)


def report(
    where: str, tensors: Tensors, abstract: Any, pieces: Sequence[Piece]
) -> None:
    """Log a quantized file's forms, and warn of what is rounded a second time.

    `abstract` has the leaves that `sharded_load.load` is about to fill.
    """
    keys = [piece.key for piece in pieces if piece.key is not None]
    if not any(isinstance(tensors[key], QuantizedTensor) for key in keys):
        return
    leaves = dict(_leaves(abstract))
    direct, requantized, dtypes = Counter(), Counter(), Counter()
    for piece in pieces:
        if piece.key is None:
            continue
        leaf, tensor = leaves[piece.path], tensors[piece.key]
        if not isinstance(leaf, Quantized):
            dtypes[leaf.dtype.name] += 1
        # `keeps` is the decision of the loader, so that the report cannot differ from
        # it.
        elif keeps(tensors, leaf, piece):
            direct[_kind(leaf)] += 1
        elif isinstance(tensor, QuantizedTensor):
            requantized[f"{tensor.form} to {_kind(leaf)}"] += 1
        else:
            dtypes[_kind(leaf)] += 1
    forms = Counter(tensors[key].form for key in keys)
    stored = ", ".join(f"{n} of {form}" for form, n in forms.most_common())
    fate = [f"{n} as {dtype}" for dtype, n in dtypes.most_common()]
    fate += [f"{n} as {kind} with the file's scales" for kind, n in direct.items()]
    fate += [f"{n} rounded again, {form}" for form, n in requantized.items()]
    log.info("%s: read %s tensors; %s", where, stored, ", ".join(fate))
    if requantized:
        log.warning(
            "%s: %d quantized tensors are rounded a second time (%s), which loses"
            " precision; fp8 keeps the file's e4m3, int8 its int8, and without quantize"
            " they are dequantized",
            *(where, requantized.total(), ", ".join(requantized)),
        )


def _leaves(abstract: Any):
    leaves = jax.tree_util.tree_leaves_with_path(
        abstract, is_leaf=parametrization.is_leaf
    )
    return ((tree.names(path), leaf) for path, leaf in leaves)


def _kind(leaf: Quantized) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(leaf, kind))
