"""Kinds of adapters: from the tensors that a file has for a layer to its update.

LoRA (Hu et al. 2021), also rank-stabilized (2312.03732), with LoCon's middle matrix and
with biases; DoRA (2402.09353); LoHa and LoKr (LyCORIS, 2309.14859); whole differences.
Matrices are in the file's layout: (out, in), and (out, in, p, p) of a convolution.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sd3_jax.data.float_bits import finite
from sd3_jax.errors import UserError
from sd3_jax.weights.safetensors import Tensor

Shape = Sequence[int]
LORA = {"A", "B", "mid"}
# Roles of whole tensors that change a weight, and those that change a bias.
WEIGHT, BIAS = ("diff", "weight"), ("B_bias", "diff_b", "bias")
NORMS = ("magnitude", "dora_scale")  # of DoRA: PEFT's, by output, and LyCORIS's


class Update(NamedTuple):
    """The tensors of a layer by role (adapter_names.ROLES); `scale` is alpha / rank."""

    tensors: Mapping[str, Tensor]
    scale: float = 1.0

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None if nothing is factored."""
        return rank(self.tensors)

    @property
    def low_rank(self) -> bool:
        """Whether a product a b is the whole update of the weight."""
        return {"A", "B"} <= set(self.tensors) <= {*LORA, *BIAS}

    @property
    def name(self) -> str:
        """The method, for messages."""
        methods = {"A": "LoRA", "hada": "LoHa", "lokr": "LoKr"}
        marks = {x.partition("_")[0] for x in self.tensors}
        names = [name for mark, name in methods.items() if mark in marks]
        if set(NORMS) & set(self.tensors):
            names.insert(0, "DoRA")
        if set(WEIGHT + BIAS) & set(self.tensors):
            names.append("whole differences")
        return " and ".join(names)


def rank(tensors: Mapping[str, Tensor]) -> int | None:
    """Rank of a layer's factors; None if nothing is factored."""
    # In each, the first axis of the matrix on the right.
    # LoKr's second matrix before its first: where both are factored ComfyUI takes the
    # rank of the second one too (its later assignment wins).
    for role in ("A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in tensors and tensors[role].shape:
            return tensors[role].shape[0]
    return None


def incomplete(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the roles that a layer has; "" if it can be read."""
    roles = set(tensors)
    if roles == {"alpha"}:
        return "has only alpha"
    if roles & {"A", "B", "mid", "B_bias"} and not {"A", "B"} <= roles:
        return f"has only {_listed(roles)}; expected lora_A and lora_B"
    if any(role.startswith("hada_") for role in roles):
        wanted = {f"hada_w{i}_{x}" for i in (1, 2) for x in "ab"}
        if not wanted <= roles or len(roles & {"hada_t1", "hada_t2"}) == 1:
            return f"has only {_listed(roles)}; expected {_listed(wanted)}"
    if any(role.startswith("lokr_") for role in roles):
        for name in ("lokr_w1", "lokr_w2"):
            pair = {f"{name}_a", f"{name}_b"}
            if (name in roles) + (pair <= roles) != 1:
                return f"has only {_listed(roles)}; expected {name} or its factors"
    if surplus := _surplus(roles):
        return f"has {_listed(surplus)} beside {_listed(roles - surplus)}; expected one"
    if rank(tensors) == 0:
        return "has factors of rank 0"
    factored = roles & {"A", "hada_w1_a", "lokr_w1", "lokr_w1_a"}
    if roles & set(NORMS) and not factored:
        return "has norms of DoRA alone; expected the matrices that they scale"
    return ""


def _surplus(roles: set[str]) -> set[str]:
    """Roles that no formula reads beside the others that a layer has."""
    pairs = [NORMS, ("diff", "weight"), ("diff_b", "bias")]
    surplus = {second for first, second in pairs if {first, second} <= roles}
    for name in ("lokr_w1", "lokr_w2"):
        if name in roles:
            surplus |= roles & {f"{name}_a", f"{name}_b"}
    if "lokr_w2" in roles:  # Tucker's core is that of its factors
        surplus |= roles & {"lokr_t2"}
    # A layer has one alpha, which would scale two methods of unlike ranks.
    methods = [
        {x for x in roles if x.startswith(start)} for start in ("hada_", "lokr_")
    ]
    methods.insert(0, roles & LORA)
    for other in [x for x in methods if x][1:]:
        surplus |= other
    return surplus


def changes(update: Update) -> set[str]:
    """ "weight", "bias" or both: the parameters of the layer that an update changes."""
    roles = set(update.tensors)
    weight = {"weight"} if roles - set(BIAS) else set()
    return weight | ({"bias"} if roles & set(BIAS) else set())


def misfit(update: Update, part: str, shape: Shape) -> str:
    """How tensors misfit a parameter of `shape` in the file's layout; "" if they fit.

    `part` is "weight" or "bias". Nothing is read.
    """
    for role, x in update.tensors.items():
        if x.dtype.kind in "biu":
            return f"{role} is of {x.dtype}; expected floats, it may be quantized"
    shapes = {role: tuple(x.shape) for role, x in update.tensors.items()}
    # Sizes and not shapes are compared where tools flatten: a (c, 1, 1) norm fits (c,).
    size, out = math.prod(shape), shape[0]
    for role in BIAS if part == "bias" else WEIGHT:
        if role in shapes and math.prod(shapes[role]) != size:
            return f"{role} is {list(shapes[role])}, expected {list(shape)}"
    if part == "bias":
        return ""
    checks = {"A": _lora_misfit, "hada_w1_a": _loha_misfit}
    for role, check in checks.items():
        if role in shapes and (fault := check(shapes, shape)):
            return fault
    if fault := _lokr_misfit(shapes, shape):
        return fault
    norms = {"magnitude": {out}, "dora_scale": {out, *shape[1:2]}}
    for role, sizes in norms.items():
        if role in shapes and math.prod(shapes[role]) not in sizes:
            return f"{role} is {list(shapes[role])}, expected {[out, 1]}"
    return ""


def factors(update: Update, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """(down, up) of a low-rank update of a weight: (rank, *shape[1:]), (out, rank).

    float32, without the scale. LoCon's middle convolution is multiplied into down.
    """
    down, up = _read(update, "A"), _read(update, "B")
    # Some tools store linear maps as 1 x 1 convolutions, and convolutions flattened.
    up = up.reshape(len(up), -1)
    if "mid" in update.tensors:  # LyCORIS: functional/general.py
        mid = _read(update, "mid")
        down = np.einsum("mn...,nj->mj...", mid, down.reshape(len(down), -1))
    return down.reshape(up.shape[1], *shape[1:]), up


def delta(
    update: Update, part: str, shape: Shape, base: Callable[[], np.ndarray]
) -> np.ndarray:
    """What is added to a weight or bias of `shape` at weight 1, in float32.

    `base()` gives the parameter's values, which DoRA and whole weights need.
    """
    roles = update.tensors
    total = np.zeros(shape, np.float32)
    if part == "bias":
        if "B_bias" in roles:  # PEFT scales it as the product (tuners/lora/layer.py)
            total += update.scale * _read(update, "B_bias").reshape(shape)
        # ComfyUI scales whole differences by the strength alone, never by alpha / rank.
        if "diff_b" in roles:
            total += _read(update, "diff_b").reshape(shape)
        return total + _replacing(update, "bias", base)
    for role, product in (("A", _lora), ("hada_w1_a", _loha)):
        if role in roles:
            total += update.scale * product(update, shape)
    if "lokr_w1" in roles or "lokr_w1_a" in roles:
        total += update.scale * _lokr(update).reshape(shape)
    if "diff" in roles:
        total += _read(update, "diff").reshape(shape)
    total = total + _replacing(update, "weight", base)
    # Last, since DoRA normalizes the weight with all that is added to it (PEFT and
    # LyCORIS: W + scale * delta).
    for role in [x for x in NORMS if x in roles]:
        w, norms = base(), _read(update, role)
        # kohya's and early files of LyCORIS have norms by input: (1, in).
        # A square matrix leaves no doubt: norms by output are (out, 1).
        by_input = role == "dora_scale" and norms.shape[:2] == (1, shape[1])
        total = _decomposed(w + total, norms, by_input) - w
    return total


def _replacing(update: Update, role: str, base: Callable[[], np.ndarray]) -> Any:
    """The change to a parameter that the file has whole; 0 if it has none."""
    if role not in update.tensors:
        return np.float32(0)
    w = base()
    return _read(update, role).reshape(w.shape) - w


def _lora(update: Update, shape: Shape) -> np.ndarray:
    down, up = factors(update, shape)
    return (up @ down.reshape(len(down), -1)).reshape(shape)


def _loha(update: Update, shape: Shape) -> np.ndarray:
    """The product, element by element, of two low-rank matrices."""
    sides = []
    for i in (1, 2):
        a, b = _read(update, f"hada_w{i}_a"), _read(update, f"hada_w{i}_b")
        core = _read(update, f"hada_t{i}") if f"hada_t{i}" in update.tensors else None
        sides.append((a @ b if core is None else _tucker(core, a, b)).reshape(shape))
    return sides[0] * sides[1]


def _lokr(update: Update) -> np.ndarray:
    """The Kronecker product of two matrices, each whole or of low rank."""
    first, second = (_kronecker_side(update, f"lokr_w{i}") for i in (1, 2))
    # Of a convolution the second one alone has the window's axes.
    first = first.reshape(first.shape + (1,) * (second.ndim - 2))
    return np.kron(first, second)


def _kronecker_side(update: Update, name: str) -> np.ndarray:
    if name in update.tensors:
        return _read(update, name)
    a, b = _read(update, f"{name}_a"), _read(update, f"{name}_b")
    # LyCORIS decomposes the second matrix alone by Tucker: the first has no window.
    if name == "lokr_w2" and "lokr_t2" in update.tensors:
        return _tucker(_read(update, "lokr_t2"), a, b)
    return a @ b


def _tucker(core: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Tucker's form of a convolution: core (r, r, p, p), a (r, out), b (r, in)."""
    return np.einsum("ijkl,ip,jr->prkl", core, a, b, optimize=True)


def _decomposed(w: np.ndarray, norms: np.ndarray, by_input: bool) -> np.ndarray:
    """DoRA: w with its norms by output, or by input, replaced (2402.09353, eq. 5)."""
    axes = (0, *range(2, w.ndim)) if by_input else tuple(range(1, w.ndim))
    length = np.sqrt(np.sum(np.square(w), axis=axes, keepdims=True))
    length = np.maximum(length, np.finfo(np.float32).tiny)  # a row of zeros stays so
    return w * (norms.reshape(length.shape) / length)


def _lora_misfit(shapes: Mapping[str, Shape], shape: Shape) -> str:
    down, up, mid = shapes["A"], shapes["B"], shapes.get("mid")
    if len(down) < 2 or len(up) < 2 or not down[0] or math.prod(up[2:]) != 1:
        return (
            f"lora_A {list(down)}, lora_B {list(up)}: expected (rank, in) and (out,"
            " rank)"
        )
    if mid is not None:
        fits = len(mid) == len(shape) and mid[:2] == (up[1], down[0])
        if not fits or tuple(mid[2:]) != tuple(shape[2:]):
            return f"lora_mid is {list(mid)}, expected (rank, rank, {list(shape[2:])})"
        down = (up[1], math.prod(down[1:]), *mid[2:])
    for side, x, wanted in (
        ("A", down, (up[1], *shape[1:])),
        ("B", up, (shape[0], up[1])),
    ):
        if x[0] != wanted[0] or math.prod(x) != math.prod(wanted):
            return f"lora_{side} is {list(x)}, expected {list(wanted)}"
    return ""


def _loha_misfit(shapes: Mapping[str, Shape], shape: Shape) -> str:
    for i in (1, 2):
        a, b = shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"]
        if len(a) != 2 or len(b) != 2:
            return _not_matrices(f"hada_w{i}_a", a, f"hada_w{i}_b", b)
        if (core := shapes.get(f"hada_t{i}")) is not None:
            full = (a[-1], b[-1], *core[2:])
            inner = core[:2] == (a[0], b[0]) and len(core) == 4
        else:
            full, inner = (a[0], b[-1]), a[-1] == b[0]
        if not inner or full[0] != shape[0] or math.prod(full) != math.prod(shape):
            return f"hada_w{i} is of {list(full)}, expected {list(shape)}"
    return ""


def _lokr_misfit(shapes: Mapping[str, Shape], shape: Shape) -> str:
    if not any(role.startswith("lokr_") for role in shapes):
        return ""
    sides = []
    for name in ("lokr_w1", "lokr_w2"):
        if name in shapes:
            sides.append(shapes[name])
            continue
        a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
        if len(a) != 2 or len(b) != 2:
            return _not_matrices(f"{name}_a", a, f"{name}_b", b)
        core = shapes.get("lokr_t2") if name == "lokr_w2" else None
        if core is not None and core[:2] == (a[0], b[0]) and len(core) == 4:
            sides.append((a[-1], b[-1], *core[2:]))
        elif core is None and a[-1] == b[0]:
            sides.append((a[0], b[-1]))
        else:
            return f"{name}_a {list(a)} and {name}_b {list(b)} do not fit each other"
    if len(sides[0]) != 2 or len(sides[1]) not in (2, 4):
        return _not_matrices("lokr_w1", sides[0], "lokr_w2", sides[1])
    size = math.prod(sides[0]) * math.prod(sides[1])
    out = sides[0][0] * sides[1][0]
    if out != shape[0] or size != math.prod(shape):
        return f"lokr_w1 {list(sides[0])} and lokr_w2 {list(sides[1])} make" + (
            f" {out} outputs and {size} values, expected {list(shape)}"
        )
    return ""


def _not_matrices(first: str, a: Shape, second: str, b: Shape) -> str:
    return f"{first} {list(a)}, {second} {list(b)}: expected two matrices"


def _read(update: Update, role: str) -> np.ndarray:
    tensor = update.tensors[role]
    x = tensor.read()
    if not finite(x):
        raise UserError(f"{tensor.path}: values that are not finite in {role}")
    return x.astype(np.float32)


def _listed(roles) -> str:
    names = {"A": "lora_A", "B": "lora_B", "mid": "lora_mid", "B_bias": "lora_B.bias"}
    return ", ".join(names.get(role, role) for role in sorted(roles))
