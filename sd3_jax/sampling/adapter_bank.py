"""Named adapters beside a bundle's weights: which there are, and how much each counts.

The base weights are never touched. A program reads the adapters and their weights as
data (params/adapters.py), so that another weight, or another set for each row of a
batch, compiles nothing; another adapter compiles, because ranks are shapes.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from sd3_jax import tree
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import listed, shown
from sd3_jax.params.adapters import (
    Adapted,
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
# {name: weight}, or one such set for each prompt or row of a batch.
Weights = Mapping[str, float | int]
Sets = Weights | Sequence[Weights]


@dataclass
class Bank:
    """Adapters by name, on the devices, and the weights that they have by default."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # of those that were read
    _prints: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, name: str, adapter: Adapter, weight: float | int) -> None:
        """Adds an adapter that is `placed`; UserError for a name that is taken."""
        self.require_new(name)
        weight = argument_checks.number(f'adapter "{shown(name)}": weight', weight)
        self.adapters[name], self.weights[name] = adapter, weight

    def require_new(self, name: Any) -> None:
        """UserError for a name that is taken, or is none."""
        if not isinstance(name, str) or not name or not name.isprintable():
            spelling = argument_checks.spelled(name)
            raise UserError(f"adapter {spelling}: expected a name that prints")
        if name in self.adapters:
            raise UserError(
                f'adapter "{shown(name)}" is loaded already; give another name, or'
                " unload it first"
            )

    def set(self, weights: Any) -> None:
        """The weights from now on; adapters that are not named get 0."""
        # By way of _row, so that an unknown name is an error and no new entry.
        self.weights = dict(zip(self.adapters, self._row(weights)))

    def unload(self, names: Sequence[str]) -> None:
        for name in names:
            self._require(name)
        for name in names:
            self.adapters.pop(name, None)
            self.weights.pop(name, None)
            self.files.pop(name, None)
        self._prints.clear()  # another adapter may take the name

    def unused_name(self, name: str) -> str:
        """`name`, or with the first number from 2 on that makes it new."""
        numbered = (f"{name}_{i}" for i in range(2, len(self.adapters) + 3))
        return next(x for x in (name, *numbered) if x not in self.adapters)

    def table(
        self, sets: Any, rows: int, row_name: str = "prompts"
    ) -> Float[np.ndarray, " n"] | Float[np.ndarray, "{rows} n"]:
        """Weights of the n adapters (n,), or (rows, n) for `sets` of each row.

        None stands for the default weights. Raises UserError for unknown names, for
        weights that are not numbers, and for another number of sets.
        """
        if sets is None:
            sets = self.weights
        if isinstance(sets, Mapping):
            # (n,) and not n weights for each row: these are multiplied into b once,
            # outside of the solver's loop (params/adapters.py).
            return np.array(self._row(sets), np.float32)
        several = isinstance(sets, list | tuple)
        if not several or not all(isinstance(x, Mapping) for x in sets):
            raise UserError(
                f"adapters {argument_checks.spelled(sets)}: expected {{name: weight}},"
                " or a list of such sets"
            )
        if len(sets) != rows:
            raise UserError(
                f"{len(sets)} sets of adapters for {rows} {row_name}: expected as many,"
                " or one {name: weight} for all"
            )
        table = [self._row(weights) for weights in sets]
        return np.array(table, np.float32).reshape(rows, len(self.adapters))

    def beside(
        self, component: str, variables: Any, table: np.ndarray, mesh: Mesh
    ) -> Any:
        """A component's variables with its adapters, for a compiled program.

        Raises UserError if rows have unlike weights for an adapter that changes biases,
        norms or tables.
        """
        # Of this component alone: the ranks of others would be shapes of its program.
        names = [name for name, x in self.adapters.items() if component in x]
        if not names:
            return variables
        deltas = tuple(self.adapters[name][component] for name in names)
        # The table's columns are in the order in which adapters were loaded.
        weights = table[..., [list(self.adapters).index(name) for name in names]]
        if weights.ndim == 2:
            for name, changes, column in zip(names, deltas, weights.T):
                if any(column != column[0]):
                    _require_linear(name, component, changes)
            weights = compiled.place(weights, mesh)
        return Adapted(variables, deltas, weights)

    def marked(self, fingerprint: str, components: Collection[str]) -> str:
        """The fingerprint of components with what the adapters add to them.

        Adapters of weight 0 do not count, nor do names.
        """
        marks = []
        for name, adapter in self.adapters.items():
            for component in adapter.keys() & components:
                if weight := self.weights[name]:
                    # A print reads the whole adapter, so it is kept; weights change.
                    if (name, component) not in self._prints:
                        text = tree.fingerprint(adapter[component])
                        self._prints[name, component] = text
                    text = self._prints[name, component]
                    marks.append(f"{component} {text} {np.float32(weight)!r}")
        # Without adapters the fingerprint is that of the weights, as before there were
        # any.
        if not marks:
            return fingerprint
        # Sorted: bundles of equal adapters have one print, in whatever order they were
        # loaded.
        text = " ".join([fingerprint, *sorted(marks)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _row(self, weights: Any) -> list[float]:
        if not isinstance(weights, Mapping):
            spelling = argument_checks.spelled(weights)
            raise UserError(f"adapters {spelling}: expected {{name: weight}}")
        for name, weight in weights.items():
            self._require(name)
            argument_checks.number(f'adapter "{shown(name)}": weight', weight)
        return [float(weights.get(name, 0.0)) for name in self.adapters]

    def _require(self, name: Any) -> None:
        if not isinstance(name, str) or name not in self.adapters:
            there = nearest(str(name), self.adapters) or "; none is loaded"
            raise UserError(f'adapter "{shown(str(name))}"{there}')


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
    mesh, spec = leaf.sharding.mesh, tuple(leaf.sharding.spec)
    if isinstance(change, Full):
        # An eight-bit kernel has no dtype in which a small change survives.
        kind = dtype if isinstance(leaf, Leaf) else leaf.dtype
        return Full(compiled.put(_cast(change.delta, kind), leaf.sharding))
    # PartitionSpec omits trailing None; the layout needs one entry for each axis.
    spec += (None,) * (len(leaf.shape) - len(spec))
    # `a` shares the kernel's input axes and `b` its output axes; the rank stays whole.
    specs = linear_layout(path, leaf).shapes(spec, None)
    pair = zip(change, specs)
    return Factors(
        *(
            compiled.put(x, NamedSharding(mesh, PartitionSpec(*axes)))
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


def _require_linear(
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
