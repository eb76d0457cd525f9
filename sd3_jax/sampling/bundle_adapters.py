"""What a bundle does with adapters: load, weigh, unload and merge them."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from sd3_jax.errors import UserError
from sd3_jax.params import adapters as common_form
from sd3_jax.sampling import lora_adapters
from sd3_jax.sampling.adapter_bank import Bank, Weights, placed
from sd3_jax.weights.components import COMPONENTS

log = logging.getLogger(__name__)


class WithAdapters:
    """The part of Bundle that changes which adapters act; they are its only state.

    load_adapter, set_adapters and unload_adapters act from the next call on.
    """

    modules: dict[str, nn.Module]
    variables: dict[str, dict]
    mesh: Mesh
    dtype: str
    bank: Bank

    @property
    def adapters(self) -> dict[str, float]:
        """The weight of each adapter that is loaded, by name."""
        return dict(self.bank.weights)

    def load_adapter(
        self,
        source: os.PathLike | str | common_form.Adapter,
        name: str | None = None,
        weight: float | int = 1.0,
        *,
        only: Sequence[str] = tuple(COMPONENTS),
    ) -> str:
        """Add an adapter, such as a LoRA, beside the weights, and return its name.

        `source` is a file, a folder or a hub name, or an adapter in the common form
        (params/adapters.py). The name is by default the file's. Parts of the adapter
        for components that `only` does not name are left out. The next call compiles,
        because the number of ranks is a shape. A file that is loaded again gets a name
        of its own, and both act; a warning says so. Raises UserError for an adapter
        that does not fit, and for a name that is taken.
        """
        if name is not None:
            # Before a file is fetched or read.
            self.bank.require_new(name)
        if isinstance(source, Mapping):
            if name is None:
                raise UserError("an adapter of arrays needs a name; set name=NAME")
            # A component that is not known is refused by `placed`.
            kept = [k for k in source if k in only or k not in COMPONENTS]
            changes = [(k, *change) for k in kept for change in source[k].items()]
            adapter = placed(name, changes, self.variables, self.dtype)
            self.bank.add(name, adapter, weight)
            return name
        text = os.fspath(source)
        (opened,) = lora_adapters.opened([(text, weight)], only, self.modules)
        return self.add_opened(opened, name)

    def add_opened(self, opened: lora_adapters.Opened, name: str | None = None) -> str:
        """load_adapter for a file whose header is read."""
        if name is None:
            name = self.bank.unused_name(lora_adapters.default_name(opened.source))
        changes = lora_adapters.changes(opened, self.variables, self.modules)
        adapter = placed(name, changes, self.variables, self.dtype)
        path = str(opened.path)
        twins = [twin for twin, file in self.bank.files.items() if file == path]
        self.bank.add(name, adapter, opened.weight)
        self.bank.files[name] = path
        if twins:
            log.warning(
                '%s: loaded again, as "%s" beside "%s"; both act. Change a weight with'
                " set_adapters, or unload_adapters first",
                *(path, name, twins[0]),
            )
        for part, leaves in adapter.items():
            message = "%s: changes %d weights of %s, times %g"
            log.info(message, opened.path, len(leaves), part, opened.weight)
        if not adapter:
            log.warning("%s: changes no component that is loaded", opened.path)
        return name

    def set_adapters(self, weights: Weights) -> None:
        """Set the adapters' weights by name; those that are not named get 0.

        Nothing is compiled and no weight of the model is touched. Raises UserError for
        unknown names.
        """
        self.bank.set(weights)

    def unload_adapters(self, *names: str) -> None:
        """Remove adapters, by default all, and free their memory."""
        self.bank.unload(names or tuple(self.adapters))

    def merge_adapters(self) -> Any:
        """A bundle without adapters, in whose weights they are added up.

        It is as fast as one that never had adapters. Eight-bit weights that an adapter
        changes become floats.
        """
        # For all rows alike: merged weights have no rows.
        table = self.bank.table(None, 0)
        variables = {
            name: common_form.merged(self.bank.beside(name, x, table, self.mesh))
            for name, x in self.variables.items()
        }
        # Fingerprints in the old memo are those of the unmerged weights.
        return dataclasses.replace(self, variables=variables, bank=Bank(), _memo={})

    def adapted(self, name: str, table: np.ndarray) -> Any:
        """A component's variables with its adapters, weighed by the bank's table."""
        return self.bank.beside(name, self.variables.get(name), table, self.mesh)
