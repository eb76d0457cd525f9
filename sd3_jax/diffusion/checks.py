"""One-line errors for values that come from outside."""

import difflib
from collections.abc import Mapping
from typing import Any

from sd3_jax.errors import ConfigError


def choose(field: str, name: str, table: Mapping[str, Any]) -> Any:
    """table[name]; ConfigError with the known names and the nearest one otherwise."""
    if name in table:
        return table[name]
    # cutoff 0: always one name, however far, since the message has a place for it.
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
    raise ConfigError(
        f"{field}: got {name!r}, expected one of {', '.join(table)} (nearest:"
        f" {nearest})"
    )


def require(ok: bool, field: str, value: Any, want: str) -> None:
    """ConfigError "field: got value, expected ..." unless `ok`."""
    if not ok:
        raise ConfigError(f"{field}: got {value!r}, expected {want}")
