"""What a bundle does with adapters: load, weigh, unload and merge them."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from sd3_jax.errors import UserError
from sd3_jax.foreign_text import shown
from sd3_jax.params import adapters as common_form
from sd3_jax.sampling import argument_checks
from sd3_jax.sampling.adapters import lora_adapters
from sd3_jax.sampling.adapters.adapter_bank import Bank
from sd3_jax.sampling.adapters.adapter_placement import flattened, placed
from sd3_jax.weights import caller_configs
from sd3_jax.weights.components import COMPONENTS

EXPECTED = "a file, a folder, a hub name or {component: {path: change}}"

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
    placement: str

    @property
    def adapters(self) -> dict[str, float]:
        """The weight of each adapter that is loaded, by name."""
        return dict(self.bank.weights)

    def load_adapter(
        self,
        source: Any,
        name: Any = None,
        weight: Any = 1.0,
        *,
        only: Any = tuple(COMPONENTS),
    ) -> str:
        """Add an adapter, such as a LoRA, beside the weights, and return its name.

        `source` is a file, a folder or a hub name, or an adapter in the common form
        (params/adapters.py). The name is by default the file's. `weight` is a number.
        Parts of the adapter for components that `only`, one name or several, does not
        name are left out. The next call compiles, because the number of ranks is a
        shape. A file that is loaded again gets a name of its own, and both act; a
        warning says so. Raises UserError for an adapter that does not fit, and for a
        name that is taken.
        """
        if name is not None:
            # Before a file is fetched or read.
            self.bank.require_new(name)
        only = caller_configs.component_names(only)
        if not isinstance(source, Mapping):
            text = argument_checks.path_text("adapter", source, EXPECTED)
            label = f'adapter "{shown(name or text)}": weight'
            weight = argument_checks.number(label, weight)
            (opened,) = lora_adapters.opened([(text, weight)], only, self.modules)
            return self.add_opened(opened, name)
        if name is None:
            raise UserError("an adapter of arrays needs a name; set name=NAME")
        weight = argument_checks.number(f'adapter "{shown(name)}": weight', weight)
        # A component that is not known is refused by `placed`.
        kept = {k: x for k, x in source.items() if k in only or k not in COMPONENTS}
        changes = flattened(name, kept)
        self.bank.add(name, placed(name, changes, self.variables, self.dtype), weight)
        return name

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

    def set_adapters(self, weights: Any) -> None:
        """Set the adapters' weights, {name: number}; those that are not named get 0.

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
        changes become floats. Raises UserError for the placement "sequential".
        """
        if self.placement != "all":
            raise UserError(
                f'placement "{self.placement}": weights are merged and saved on the'
                ' devices; load the model with placement="all"'
            )
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
