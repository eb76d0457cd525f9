"""A PyTorch state dict as our variables, through the same tables as the loader."""

import jax
import numpy as np

from sd3_jax import tree
from sd3_jax.tools.parity.miniature import randomise  # noqa: F401
from sd3_jax.weights import key_mapping


def from_torch(variables, table, state_dict, layout="diffusers", ignore=()):
    """`variables` are ours or their shapes; all tensors and all leaves must be used."""
    leaves = jax.tree.map(
        lambda x: np.full(x.shape, np.nan, np.float32), tree.unbox(variables)
    )
    unused = set(state_dict) - set(ignore)
    for piece in key_mapping.pieces(leaves, table, layout):
        if piece.key is None:
            part = piece.fill()
        else:
            tensor = state_dict[piece.key].detach().float().numpy()
            assert tensor.shape == piece.file_shape, (piece.key, tensor.shape, piece)
            unused.remove(piece.key)
            part = piece.read(tensor)
        leaf = leaves
        for name in piece.path:
            leaf = leaf[name]
        leaf[piece.index] = part
    assert not unused, sorted(unused)[:10]
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(leaves))
    return leaves


def error(ours, theirs) -> float:
    """max |ours - theirs| / std(theirs)."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else theirs
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return float(np.abs(ours - theirs).max() / theirs.std())
