"""Adapters onto the devices: which leaves they change, checked one by one."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import listed, shown
from sd3_jax.params.adapters import (
    Adapter,
    Factors,
    Full,
    Path,
    linear_layout,
)
from sd3_jax.params.parametrization import Leaf
from sd3_jax.sampling import argument_checks, compiled

# Of a change of a weight at adapter weight 1: norms square activations in float32.
LARGEST = 1e12


def flattened(
    name: str, adapter: Mapping[Any, Any]
) -> list[tuple[str, Path, Factors | Full]]:
    """(component, path of the leaf, change) of an adapter of arrays.

    UserError for what is not in the common form.
    """
    changes = []
    for component, parts in adapter.items():
        if not isinstance(component, str) or not isinstance(parts, Mapping):
            raise UserError(
                f'adapter "{shown(name)}": {argument_checks.spelled(component)} is'
                f" {argument_checks.spelled(parts)}; expected a component's name and"
                " {path: change}"
            )
        for path, change in parts.items():
            texts = isinstance(path, tuple) and all(isinstance(x, str) for x in path)
            if not texts or not path or not isinstance(change, Factors | Full):
                raise UserError(
                    f'adapter "{shown(name)}": {shown(component)}:'
                    f" {argument_checks.spelled(path)} is"
                    f" {argument_checks.spelled(change)}; expected a tuple of names,"
                    " and Factors or Full"
                )
            changes.append((component, path, change))
    return changes


def placed(
    name: str,
    changes: Iterable[tuple[str, Path, Factors | Full]],
    variables: Mapping[str, Any],
    dtype: str,
) -> Adapter:
    """An adapter on the devices of the weights that it changes, sharded as they are.

    `changes` are (component, path of the leaf, change), placed one after the other.
    `dtype` is that of a change of an eight-bit weight; any other has its weight's.
    Raises UserError with the number and the first names of leaves that the components
    lack, or that have another shape.
    """
    adapter: Adapter = {}
    faults, count = [], 0
    for component, path, change in changes:
        if component not in variables:
            raise UserError(
                f'adapter "{shown(name)}" adapts {shown(component)}, but the bundle has'
                f" only {', '.join(variables)}; add a file that has it, after a comma"
            )
        # One at a time: `changes` reads a file's leaf when it is asked for, so that
        # host memory holds one.
        leaf, count = _leaf(variables[component]["params"], path), count + 1
        if fault := _fault(path, change, leaf):
            faults.append(f"{component}/{'/'.join(path)} {fault}")
        else:
            parts = adapter.setdefault(component, {})
            parts[path] = _put(path, change, leaf, dtype)
    if faults:
        raise UserError(
            f'adapter "{shown(name)}": {len(faults)} of {count} changes do not fit the'
            f" model: {listed(faults, '; ')}"
        )
    return adapter


def _put(path: Path, change: Factors | Full, leaf: Any, dtype: str) -> Factors | Full:
    # In the memory of the weights, which may be the host's (sampling/placement.py).
    mesh, kind = leaf.sharding.mesh, leaf.sharding.memory_kind
    spec = tuple(leaf.sharding.spec)
    if isinstance(change, Full):
        # An eight-bit kernel has no dtype in which a small change survives.
        changed = dtype if isinstance(leaf, Leaf) else leaf.dtype
        return Full(compiled.put(_cast(change.delta, changed), leaf.sharding))
    # PartitionSpec omits trailing None; the layout needs one entry for each axis.
    spec += (None,) * (len(leaf.shape) - len(spec))
    # `a` shares the kernel's input axes and `b` its output axes; the rank stays whole.
    specs = linear_layout(path, leaf).shapes(spec, None)
    pair = zip(change, specs)
    return Factors(
        *(
            compiled.put(x, NamedSharding(mesh, PartitionSpec(*axes), memory_kind=kind))
            for x, axes in pair
        )
    )


def _cast(x: Any, dtype: Any) -> Any:
    return x if x.dtype == jnp.dtype(dtype) else x.astype(dtype)


def _leaf(params: Any, path: Path) -> Any:
    """The leaf at a path, or None."""
    for part in path:
        if not isinstance(params, Mapping) or part not in params:
            return None
        params = params[part]
    return None if isinstance(params, Mapping) else params


def _fault(path: Path, change: Factors | Full, leaf: Any) -> str:
    """Why a leaf cannot have this change, or ""."""
    if leaf is None:
        return "is not in the model"
    for x in change:
        if not isinstance(x, np.ndarray | Array):
            return f"is of class {type(x).__name__}; expected arrays"
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return f"is of {x.dtype}; expected floats"
    shapes = tuple(tuple(x.shape) for x in change)
    if isinstance(change, Full):
        expected = (tuple(leaf.shape),)
    elif (layout := linear_layout(path, leaf)) is None:
        return "is not a linear map; expected Full"
    else:
        expected = layout.shapes(tuple(leaf.shape), change.a.shape[-1])
    if shapes == expected:
        return _excess(change)
    return (
        f"is of {', '.join(map(str, shapes))}, expected {', '.join(map(str, expected))}"
    )


def _excess(change: Factors | Full) -> str:
    """Why the values of a change cannot be computed with, or ""."""
    # A bound of a b: finite factors may have an infinite product.
    bound = math.prod(map(_largest, change))
    bound *= change.a.shape[-1] if isinstance(change, Factors) else 1
    if bound <= LARGEST:  # which NaN is not
        return ""
    return f"changes its values by up to {bound:.3g}; expected {LARGEST:g} at most"


def _largest(x: Any) -> float:
    """The largest magnitude; NaN if there is one."""
    if not x.size:
        return 0.0
    with np.errstate(invalid="ignore"):  # numpy warns of a bfloat16's NaN
        high, low = float(x.max()), -float(x.min())  # no copy of x, as abs would be
    return low if low > high else high


def require_linear(
    name: str, component: str, changes: Mapping[Path, Factors | Full]
) -> None:
    """UserError if an adapter whose weight differs by row changes what rows share."""
    shared = [
        "/".join(path)
        for path, change in changes.items()
        if isinstance(change, Full) and linear_layout(path, change.delta) is None
    ]
    if shared:
        raise UserError(
            f'adapter "{shown(name)}" changes {len(shared)} biases, norms or tables of'
            f" {component}, which all rows share: {listed(shared)}; give it one weight"
            " for all rows, or call once for each set"
        )
