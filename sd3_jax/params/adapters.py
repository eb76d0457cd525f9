"""The common form of adapters: changes of named weights, whatever file they are of.

A compiled program takes a component's variables as Adapted, with the adapters beside
them and their weights as data, and `attached` puts the two together in the trace.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sd3_jax.params import lora
from sd3_jax.params.parametrization import LowRank, Summed


class Factors(NamedTuple):
    """W + weight * a b of a linear map; alpha / rank is already in b.

    Shapes of parametrization.LowRank's a and b, with the layers' axis of scanned stacks
    and the groups of fused q, k and v.
    """

    a: Array | np.ndarray
    b: Array | np.ndarray


class Full(NamedTuple):
    """leaf + weight * delta, for kernels, biases, norm scales and embeddings."""

    delta: Array | np.ndarray  # in the leaf's own shape


Path = tuple[str, ...]
# By component ("denoiser", "clip_l", "clip_g", "t5"), then by the leaf's path in
# variables["params"], its own name included ("kernel", "bias", "scale").
Adapter = dict[str, dict[Path, Factors | Full]]


class Adapted(NamedTuple):
    """A component's variables, and what each adapter changes of them.

    `weights` are (n,), or (rows, n) for the rows of a batch, of n adapters.
    """

    variables: Any
    deltas: Sequence[dict[Path, Factors | Full]]
    weights: Any


def attached(variables: Any) -> Any:
    """Adapted variables as linen's, with a Leaf in place of each adapted kernel.

    Biases, norms and tables become the weighted sum; with weights by row, those of the
    first row. Variables without adapters are returned as they are.
    """
    if not isinstance(variables, Adapted):
        return variables
    base, deltas, weights = variables
    params = base["params"]
    # Sorted: sets of texts have another order in each process, and all processes must
    # trace one program.
    for path in sorted(set().union(*deltas)):
        members = [(i, x[path]) for i, x in enumerate(deltas) if path in x]
        change = functools.partial(_with_deltas, path, members, weights)
        params = lora.replaced_leaf(params, path, change)
    # A new dict: the bundle's own variables are never changed in place.
    return base | {"params": params}


def merged(variables: Any) -> Any:
    """Adapted variables with the weighted sums as plain arrays; weights are by adapter.

    A merged eight-bit kernel becomes an array: rounding it again would lose the update.
    """
    if not isinstance(variables, Adapted):
        return variables
    # Adapters of weight 0 are left out, so that a kernel that none changes stays the
    # array that it was, and in eight bits if it was.
    kept = [i for i, weight in enumerate(variables.weights) if weight != 0]
    deltas = [variables.deltas[i] for i in kept]
    if not deltas:
        return variables.variables
    sums = attached(Adapted(variables.variables, deltas, variables.weights[kept]))
    is_sum = lambda x: isinstance(x, LowRank | Summed)
    array = lambda x: x.array() if is_sum(x) else x
    return jax.tree.map(array, sums, is_leaf=is_sum)


def linear_layout(path: Path, leaf: Any) -> lora.Layout | None:
    """The layout of a linear map's kernel; None for other leaves.

    Rows of a batch can have weights of their own for linear maps alone.
    """
    return lora.layout(path[:-1], len(leaf.shape)) if path[-1] == "kernel" else None


def _with_deltas(path: Path, members: Sequence[tuple], weights: Any, leaf: Any) -> Any:
    """A leaf with the (adapter's number, delta)s of all adapters that change it."""
    # float32 whatever the leaf's dtype is: in bfloat16 a weight of 0.7 would be 0.699.
    weights = jnp.asarray(weights, jnp.float32)
    full = [(i, x.delta) for i, x in members if isinstance(x, Full)]
    factors = [(i, x) for i, x in members if isinstance(x, Factors)]
    layout = linear_layout(path, leaf)
    if layout is None:
        # Modules read these as arrays, which all rows share.
        # All rows have this weight: Bank.beside has refused others.
        shared = weights if weights.ndim == 1 else weights[0]
        return _summed(leaf, full, shared, 0).array()
    if full:
        # Both kinds may change one kernel: the low-rank update then has the sum as its
        # base.
        leaf = _summed(leaf, full, weights, layout.layers)
    return _low_rank(leaf, factors, weights, layout) if factors else leaf


def _summed(leaf: Any, full: Sequence[tuple], weights: Array, layers: int) -> Summed:
    numbers, deltas = zip(*full)
    weights = _stacked(weights[..., np.array(numbers)], leaf, layers)
    return Summed(leaf, deltas, weights, by_row=weights.ndim - layers == 2)


def _low_rank(
    leaf: Any, factors: Sequence[tuple], weights: Array, layout: lora.Layout
) -> LowRank:
    # Factors of all adapters side by side: the products are as many as for one.
    rank_axis, groups = layout.layers + layout.groups, bool(layout.groups)
    a = jnp.concatenate([x.a for _, x in factors], axis=-1)
    if weights.ndim == 1:
        # Weighed here, outside of the solver's loop, b costs what one LoRA's costs.
        parts = [weights[i] * x.b.astype(jnp.float32) for i, x in factors]
        return LowRank(leaf, a, jnp.concatenate(parts, rank_axis), groups=groups)
    b = jnp.concatenate([x.b for _, x in factors], axis=rank_axis)
    # A weight for each rank and not for each adapter: one product serves adapters of
    # unlike ranks.
    ranks = [x.a.shape[-1] for _, x in factors]
    columns = np.repeat([i for i, _ in factors], ranks)  # the adapter of each rank
    rows = _stacked(weights[:, columns], leaf, layout.layers)
    return LowRank(leaf, a, b, rows, groups=groups)


def _stacked(weights: Array, leaf: Any, layers: int) -> Array:
    """The weights once for each layer of a stack, which a scan takes apart."""
    return jnp.broadcast_to(weights, (*leaf.shape[:layers], *weights.shape))
