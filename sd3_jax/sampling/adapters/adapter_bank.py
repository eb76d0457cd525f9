"""Named adapters beside a bundle's weights: which there are, and how much each counts.

The base weights are never touched. A program reads the adapters and their weights as
data (params/adapters.py), so that another weight, or another set for each row of a
batch, compiles nothing; another adapter compiles, because ranks are shapes.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from sd3_jax import tree
from sd3_jax.errors import UserError, nearest
from sd3_jax.foreign_text import shown
from sd3_jax.params.adapters import (
    Adapted,
    Adapter,
)
from sd3_jax.sampling import argument_checks, compiled
from sd3_jax.sampling.adapters.adapter_placement import require_linear

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
                    require_linear(name, component, changes)
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
