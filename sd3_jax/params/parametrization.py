"""Leaves that take the place of a weight's array, such as a LoRA beside its base.

Eight-bit weights are in params/quantization.py.
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
    """A pytree node instead of a weight; `array()` computes the weight."""

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
    """x itself, or the weight that the Leaf x stands for."""
    return x.array() if isinstance(x, Leaf) else x


def arrays(tree: Any) -> Any:
    """The tree with each Leaf replaced by the weight that it stands for."""
    return jax.tree.map(array, tree, is_leaf=is_leaf)


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def stored(module: nn.Module, name: str) -> Leaf | None:
    """The module's parameter if it is a Leaf, else None."""
    # flax's own `param` would compare the leaves of the Leaf with the array's shape.
    if not module.has_variable("params", name):
        return None
    value = module.get_variable("params", name)
    return value if isinstance(value, Leaf) else None


def product(x: Array, kernel: Any, axes: Axes, inputs: int) -> Array:
    """linear(x, kernel) in x's dtype, for a kernel that is an array or a Leaf."""
    if isinstance(kernel, Leaf):
        return kernel.product(x, axes, inputs)
    return linear(x, kernel.astype(x.dtype), axes, inputs)


class OnBase(Leaf):
    """A Leaf that changes `base`, an array or another Leaf, and has its shape."""

    base: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def sharding(self) -> Any:
        return self.base.sharding


@struct.dataclass
class LowRank(OnBase):
    """base + scale * a b, for LoRA (Hu et al. 2021); `scale` is alpha / rank.

    base is (*inputs, *outputs), an array or another Leaf; a (*inputs, rank) and b
    (rank, *outputs). With `groups`, the first output axis counts fused maps, such as q,
    k and v, each with its own a (*inputs, groups, rank) and b (groups, rank, *others).
    In a stack of layers all have the layers' axis in front. `rows` (rows, rank) weigh
    each rank for each row of a batch; then there is no one weight array.
    """

    base: Any
    a: Any
    b: Any
    rows: Any = None
    # Static fields: optimizers, EMA and sharding see base, a and b alone.
    scale: float = struct.field(pytree_node=False, default=1.0)
    groups: bool = struct.field(pytree_node=False, default=False)

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def array(self) -> Array:
        """base + scale * a b, summed in float32 and returned in base's dtype.

        Raises ValueError where rows have weights of their own.
        """
        if self.rows is not None:
            raise ValueError("each row of the batch has another weight")
        base = array(self.base)
        total = base.astype(jnp.float32) + self.scale * self.update()
        return total.astype(base.dtype)

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        # x W + (x a) b: in bfloat16, W + a b would round a small update away.
        y = product(x, self.base, axes, inputs)
        rank = (None, None) if self.groups else (None,)
        h = linear(x, self.a.astype(x.dtype), (*axes[:inputs], *rank), inputs)
        h = self.scale * h  # (b, ..., [groups,] rank)
        if self.rows is not None:
            h = times_rows(h, self.rows)
        b = self.b.astype(x.dtype)
        if not self.groups:
            return y + linear(h, b, (None, *axes[inputs:]), 1)
        # --- fused maps: h (b, ..., groups, rank), b (groups, rank, *others)
        axis, outputs = h.ndim - 2, (None, *axes[inputs + 1 :])
        parts = [linear(h[..., i, :], b[i], outputs, 1) for i in range(len(b))]
        return y + jnp.stack(parts, axis)

    def update(self) -> Array:
        """a b, in float32 and in base's shape."""
        shared = 1 + self.groups  # a's last axes and b's first: [groups,] rank
        layers = self.a.ndim + self.b.ndim - len(self.shape) - shared - 1
        a, b = (x.astype(jnp.float32) for x in (self.a, self.b))
        groups, rank = a.shape[-2] if self.groups else 1, a.shape[-1]
        stack = math.prod(a.shape[:layers])  # 1 for a module outside a scan
        # All inputs as one axis, x, and all other outputs as one, y.
        a, b = a.reshape(stack, -1, groups, rank), b.reshape(stack, groups, rank, -1)
        # "highest": TPUs and GPUs would round float32 factors, and merge keeps the sum.
        delta = jnp.einsum("lxgr,lgry->lxgy", a, b, precision="highest")
        return delta.reshape(self.shape)


@struct.dataclass
class Summed(OnBase):
    """base + the sum of weights[i] * deltas[i], for updates of full rank.

    base is an array or another Leaf, each delta an array of its shape. `weights` are
    (n,), or with `by_row` (rows, n) for the rows of a batch; then there is no one
    weight array. In a stack of layers all have the layers' axis in front.
    """

    base: Any
    deltas: tuple
    weights: Any
    by_row: bool = struct.field(pytree_node=False, default=False)

    def array(self) -> Array:
        """The sum in base's dtype; ValueError where rows have weights of their own."""
        if self.by_row:
            raise ValueError("each row of the batch has another weight")
        total = array(self.base).astype(jnp.float32)
        for weight, delta in zip(jnp.unstack(self.weights, axis=-1), self.deltas):
            weight = weight.reshape(*weight.shape, *[1] * (delta.ndim - weight.ndim))
            total = total + weight * delta.astype(jnp.float32)
        return total.astype(self.base.dtype)

    def product(self, x: Array, axes: Axes, inputs: int) -> Array:
        if not self.by_row:
            # One layer's sum at a time: summed beforehand, they would fill the memory
            # of a second model.
            return linear(x, self.array().astype(x.dtype), axes, inputs)
        y = product(x, self.base, axes, inputs)
        for i, delta in enumerate(self.deltas):
            update = linear(x, delta.astype(x.dtype), axes, inputs)
            y = y + times_rows(update, self.weights[:, i : i + 1])
        return y


def times_rows(x: Array, weights: Array) -> Array:
    """x (k b, ..., n) times weights (b, n) or (b, 1), in float32 and then in x's dtype.

    Guidance runs k conditions in a batch, one after the other.
    """
    # An error and not a broadcast: rows that do not match belong to other pictures.
    if len(x) % len(weights):
        raise ValueError(f"weights of {len(weights)} rows for a batch of {len(x)}")
    weights = jnp.tile(weights, (len(x) // len(weights), 1))
    weights = weights.reshape(len(x), *[1] * (x.ndim - 2), -1)
    return (weights * x.astype(jnp.float32)).astype(x.dtype)
