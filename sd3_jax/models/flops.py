"""Floating-point operations of a forward pass, counted by hand: 2 a multiply-add.

XLA's cost analysis counts a scanned block once and a Pallas kernel as nothing, so model
FLOPs and MFU are analytic, as published MFU is. Every count is for one image, `height`
and `width` in latents, with `text` tokens of width `text_dim`.
"""

from flax import linen as nn

from sd3_jax.models.dit import CrossDiT, DiT
from sd3_jax.models.mmdit import MMDiT
from sd3_jax.models.unet import UNet
from sd3_jax.models.uvit import UViT


def forward(
    model: nn.Module, *, height: int, width: int, text: int, text_dim: int
) -> float:
    """FLOPs of one image through a denoiser; KeyError for another kind of module."""
    count = COUNTS[type(model)]
    return count(model, height=height, width=width, text=text, text_dim=text_dim)


def mmdit(model: MMDiT, *, height: int, width: int, text: int, text_dim: int) -> float:
    d, n = model.width, tokens(model, height, width)
    token = 2 * (4 + 2 * model.mlp_ratio) * d**2  # qkv, out and the two of the MLP
    image = model.depth * token * n
    words = ((model.depth - 1) * token + 2 * 3 * d**2) * text  # the last has qkv only
    # q k^T and weights v: 2 d a pair of tokens each. The last block has image queries.
    joint = 4 * d * ((model.depth - 1) * (n + text) ** 2 + n * (n + text))
    # qkv and out, attention among n tokens, and three more chunks of adaLN.
    dual = model.dual_blocks * (8 * d**2 * n + 4 * d * n**2 + 6 * d**2)
    # adaLN has 6 chunks a stream (the last text stream 2), the final one 2; the rest
    # is the embedders of time (256 -> d -> d) and of the pooled text, its second layer.
    vectors = 2 * d**2 * (12 * model.depth - 4 + 2 + 2) + 2 * 256 * d
    return float(
        image + words + joint + dual + vectors + ends(model, n, text, text_dim)
    )


def dit(model: DiT, *, height: int, width: int, text: int, text_dim: int) -> float:
    d, n = model.width, tokens(model, height, width)
    blocks = model.depth * block(d, n + text, model.mlp_ratio)
    return float(blocks + modulated(model) + ends(model, n, text, text_dim))


def crossdit(
    model: CrossDiT, *, height: int, width: int, text: int, text_dim: int
) -> float:
    d, n = model.width, tokens(model, height, width)
    blocks = model.depth * (block(d, n, model.mlp_ratio) + cross(d, n, text, d))
    return float(blocks + modulated(model) + ends(model, n, text, text_dim))


def uvit(model: UViT, *, height: int, width: int, text: int, text_dim: int) -> float:
    d, n, p = model.width, tokens(model, height, width), model.patch
    length = 2 + text + n  # time and pooled text are tokens
    skips = model.depth // 2 * 2 * 2 * d**2 * length  # from 2d to d
    blocks = model.depth * block(d, length, model.mlp_ratio) + skips
    conv = 2 * 9 * model.channels**2 * n * p**2
    vectors = 2 * d**2 * 2 + 2 * 256 * d
    return float(blocks + conv + vectors + ends(model, n, text, text_dim))


def unet(model: UNet, *, height: int, width: int, text: int, text_dim: int) -> float:
    last, e = len(model.multipliers) - 1, 4 * model.width
    sizes = [model.width * times for times in model.multipliers]
    points = [  # pixels of each level
        height * width // (model.patch * 2**level) ** 2 for level in range(last + 1)
    ]

    def conv(level, inputs, out, size=3):
        return 2 * size**2 * inputs * out * points[level]

    def one(level, inputs, attends):
        d, n = sizes[level], points[level]
        total = conv(level, inputs, d) + conv(level, d, d) + 2 * e * d
        total += conv(level, inputs, d, 1) if inputs != d else 0
        if attends:  # proj_in and proj_out; GEGLU is a half more than an MLP
            total += 2 * 2 * d**2 * n + block(d, n, 1.5 * model.mlp_ratio)
            total += cross(d, n, text, text_dim)
        return total

    vectors = 2 * (256 + 2 * e) * e  # embedders of time and of the pooled text
    ends = 2 * conv(0, model.patch**2 * model.channels, model.width)
    total, at = vectors + ends, model.width
    skips = [at]  # channels, pushed on the way down and popped on the way up
    for level in range(last + 1):
        for _ in range(model.depth):
            total, at = total + one(level, at, level in model.attended), sizes[level]
            skips.append(at)
        if level < last:
            total += conv(level + 1, at, at)
            skips.append(at)
    total += one(last, at, True) + one(last, at, False)
    for level in reversed(range(last + 1)):
        for _ in range(model.depth + 1):
            total += one(level, at + skips.pop(), level in model.attended)
            at = sizes[level]
        if level:
            total += conv(level - 1, at, at)  # after upsampling
    return float(total)


COUNTS = {MMDiT: mmdit, DiT: dit, CrossDiT: crossdit, UViT: uvit, UNet: unet}


def tokens(model: nn.Module, height: int, width: int) -> int:
    return (height // model.patch) * (width // model.patch)


def block(d: int, n: int, ratio: int | float) -> float:
    """qkv, out and the MLP of n tokens, and their self-attention."""
    return float(2 * (4 + 2 * ratio) * d**2 * n + 4 * d * n**2)


def cross(d: int, n: int, text: int, text_dim: int) -> float:
    """Cross-attention: q and out of n tokens, k and v of the text's."""
    return float(2 * 2 * d**2 * n + 2 * 2 * text_dim * d * text + 4 * d * n * text)


def modulated(model: nn.Module) -> float:
    """adaLN of every block and of the end, and the embedders of the condition."""
    d = model.width
    return float(2 * d**2 * (6 * model.depth + 2 + 2) + 2 * 256 * d)


def ends(model: nn.Module, n: int, text: int, text_dim: int) -> float:
    """Patches to tokens and back, and the text's embedding."""
    d = model.width
    return float(4 * n * model.patch**2 * model.channels * d + 2 * text * text_dim * d)
