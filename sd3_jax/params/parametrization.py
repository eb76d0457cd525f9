"""What may stand for a weight's array, such as a matrix with one of low rank (LoRA).

Eight bits for a weight are in models/quantized.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import Array

from sd3_jax.models.sharded_linear import Axes, linear


class Leaf:
    """A pytree node in the place of a weight, which `array()` makes of it."""

    shape: tuple[int, ...]
    dtype: Any

    def array(self) -> Array:
        raise NotImplementedError

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        """linear(x, array(), axes, inputs) in x's dtype, without making the array."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)


def array(x: Any) -> Any:
    """The weight that x is, or that it stands for."""
    return x.array() if isinstance(x, Leaf) else x


def arrays(tree: Any) -> Any:
    """A tree with nothing in it but arrays."""
    return jax.tree.map(array, tree, is_leaf=is_leaf)


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def stored(module: nn.Module, name: str) -> Leaf | None:
    """The module's parameter where it stands for an array, which flax's own `param`
    would compare with the array's shape; else None."""
    if not module.has_variable("params", name):
        return None
    value = module.get_variable("params", name)
    return value if isinstance(value, Leaf) else None


def product(x: Array, kernel: Any, axes: Axes, inputs: int) -> Array:
    """linear(x, kernel) in x's dtype; what stands for a kernel makes no array."""
    if isinstance(kernel, Leaf):
        return kernel.product(x, axes, inputs)
    return linear(x, kernel.astype(x.dtype), axes, inputs)


@struct.dataclass
class LowRank(Leaf):
    """base + scale * a b, for LoRA (Hu et al. 2021); `scale` is alpha / rank.

    base (*inputs, *outputs), a weight or what stands for one; a (*inputs, rank) and b
    (rank, *outputs). With `groups` the first output axis counts maps that base fuses,
    each of which has its own: a (*inputs, groups, rank), b (groups, rank, *others). In
    a stack of layers all three have their axis in front.
    """

    base: Any
    a: Any
    b: Any
    scale: float = struct.field(pytree_node=False)
    groups: bool = struct.field(pytree_node=False, default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def sharding(self) -> Any:
        return self.base.sharding

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def array(self) -> Array:
        """The sum in float32, then in base's dtype."""
        base = array(self.base)
        total = base.astype(jnp.float32) + self.scale * self.update()
        return total.astype(base.dtype)

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        y = product(x, self.base, axes, inputs)
        rank = (None, None) if self.groups else (None,)
        h = linear(x, self.a.astype(x.dtype), (*axes[:inputs], *rank), inputs)
        h = self.scale * h  # (b, ..., [groups,] rank)
        b = self.b.astype(x.dtype)
        if not self.groups:
            return y + linear(h, b, (None, *axes[inputs:]), 1)
        axis, outputs = h.ndim - 2, (None, *axes[inputs + 1 :])
        parts = [linear(h[..., i, :], b[i], outputs, 1) for i in range(len(b))]
        return y + jnp.stack(parts, axis)

    def update(self) -> Array:
        """a b, in float32 and base's shape."""
        shared = 1 + self.groups  # a's last axes and b's first: [groups,] rank
        layers = self.a.ndim + self.b.ndim - len(self.shape) - shared - 1
        a, b = (x.astype(jnp.float32) for x in (self.a, self.b))
        groups, rank = a.shape[-2] if self.groups else 1, a.shape[-1]
        stack = math.prod(a.shape[:layers])
        a, b = a.reshape(stack, -1, groups, rank), b.reshape(stack, groups, rank, -1)
        delta = jnp.einsum("lxgr,lgry->lxgy", a, b, precision="highest")
        return delta.reshape(self.shape)
