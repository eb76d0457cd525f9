"""FLOPs of the matrix products, convolutions and attention kernels of a program."""

import math
import re
from collections import Counter

import numpy as np

from sd3_jax.tools.plan.hlo import (
    Computation,
    Instruction,
    Module,
)
from sd3_jax.tools.plan.loop_trips import trips

EIGHT_BITS = ("s8", "f8e4m3fn")  # HLO's names of int8 and fp8


def products(body: Computation, module: Module) -> Counter:
    """FLOPs of all matrix products of a computation and of what it calls, by `rate`."""
    total: Counter = Counter()
    for x in body:
        if x.opcode in ("convolution", "dot"):
            total[rate(x, body)] += product(x, body)
        elif x.opcode in ("fusion", "call"):
            total += products(module[x.called[0]], module)
        elif x.opcode == "while":
            # Rings of overlapped collectives are loops with a product in the body.
            turn = products(module[x.attribute(r"body=%?([\w.\-]+)")], module)
            turns = trips(x, body, module) or 1
            total += Counter({kind: turns * flops for kind, flops in turn.items()})
    return total


def rate(x: Instruction, home: Computation) -> str:
    """The dtype of both operands of a product if it is one of EIGHT_BITS, else ""."""
    # An operand of other bits is converted to, and the product runs at that rate.
    left, right = (home.by_name[name].shapes[0].dtype for name in x.operands[:2])
    return left if left == right and left in EIGHT_BITS else ""


def product(x: Instruction, home: Computation) -> float:
    """2 a multiply-add; a convolution's products with padding and holes left out."""
    left, right = (home.by_name[name].shapes[0].sides for name in x.operands[:2])
    if x.opcode == "dot":
        axes = x.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        contracted = math.prod(left[int(i)] for i in axes.split(",") if i)
        return 2.0 * x.shapes[0].elements * contracted
    # On TPUs XLA writes most matrix products as convolutions, with a batch axis b,
    # feature axes f, i, o and spatial axes numbered from 0.
    labels = x.attribute(r"dim_labels=(\w+_\w+->\w+)")
    of_left, of_right, of_result = re.split("_|->", labels)
    size = lambda sides, names, label: sides[names.index(label)]
    result = x.shapes[0].sides
    spatial = [label for label in of_left if label.isdigit()]
    # Spatial axes of a product-like convolution count each pair that meets data;
    # padding and holes of dilation are no multiplications.
    pairs = math.prod(
        _meetings(
            x.attributes,
            int(label),
            size(left, of_left, label),
            size(right, of_right, label),
            size(result, of_result, label),
        )
        for label in spatial
    )
    flat = size(result, of_result, "b") * size(result, of_result, "f")
    return 2.0 * flat * pairs * size(right, of_right, "i")


def _meetings(attributes: str, axis: int, base: int, window: int, result: int) -> int:
    """How many pairs of a window's and a result's places meet a number of the input."""
    stride = _of_window(attributes, "stride", axis, 1)
    low = _of_window(attributes, "pad", axis, 0)
    holes = _of_window(attributes, "lhs_dilate", axis, 1)
    spread = _of_window(attributes, "rhs_dilate", axis, 1)
    # (result, window) positions in the padded, dilated input
    places = np.arange(result)[:, None] * stride + np.arange(window) * spread - low
    last = (base - 1) * holes
    return int(np.sum((places >= 0) & (places <= last) & (places % holes == 0)))


def _of_window(attributes: str, name: str, axis: int, default: int) -> int:
    window = re.search(r"window=\{([^}]*)\}", attributes)
    match = window and re.search(rf"\b{name}=(\S+)", window[1])
    return int(match[1].split("x")[axis].split("_")[0]) if match else default


def splash(x: Instruction, home: Computation) -> tuple[float, int]:
    """FLOPs of a splash attention kernel, and the size of a head.

    Forward makes 2 products of (queries, keys, head), dq 3, dkv 4; one that makes all
    three gradients 5, and writes a dq for every block of keys. The last two axes are
    tokens and head, in either order; the head is the one that queries and keys share.
    """
    arrays = [home.by_name[name].shapes[0] for name in x.operands]
    # Queries and keys come first; masks and block tables are integers.
    wide = [s.sides for s in arrays if len(s.sides) >= 3 and s.dtype in ("bf16", "f32")]
    queries, keys = wide[:2]
    # The backward kernels are told apart by name and by the rank of their results.
    if "_dkv" in x.name:
        deepest = max(len(shape.sides) for shape in x.shapes)
        count = 5 if deepest > len(queries) else 4
    else:
        count = 3 if "_dq" in x.name else 2
    shared = [a for a, b in zip(queries[-2:], keys[-2:]) if a == b]
    head = min(shared, default=queries[-1])
    return 2.0 * count * math.prod(queries) * math.prod(keys[-2:]) / head, head
