"""Floating-point operations of a forward pass, counted by hand: 2 a multiply-add.

XLA's cost analysis counts a scanned block once and a Pallas kernel as nothing, so model
FLOPs and MFU are analytic, as published MFU is. Every count is for one image, `height`
and `width` in latents, with `text` tokens of width `text_dim`.
"""

from flax import linen as nn


def tokens(model: nn.Module, height: int, width: int) -> int:
    return (height // model.patch) * (width // model.patch)


def block(d: int, n: int, ratio: int | float) -> float:
    """qkv, out and the MLP of n tokens, and their self-attention."""
    return float(2 * (4 + 2 * ratio) * d**2 * n + 4 * d * n**2)


def cross(d: int, n: int, text: int, text_dim: int) -> float:
    """Cross-attention: q and out of n tokens, k and v of the text's."""
    return float(2 * 2 * d**2 * n + 2 * 2 * text_dim * d * text + 4 * d * n * text)


def modulated(model: nn.Module) -> float:
    """adaLN of every block and of the end, and the embedders of the condition.

    Of the pooled text's embedder it is the second layer: the first is a matrix for one
    row, and its width is not known here.
    """
    d = model.width
    return float(2 * d**2 * (6 * model.depth + 2 + 2) + 2 * 256 * d)


def ends(model: nn.Module, n: int, text: int, text_dim: int) -> float:
    """Patches to tokens and back, and the text's embedding."""
    d = model.width
    return float(4 * n * model.patch**2 * model.channels * d + 2 * text * text_dim * d)
