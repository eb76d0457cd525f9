"""The packages of the extra `serve`, which few installations have."""

import importlib.util
from collections.abc import Sequence

from sd3_jax.errors import UserError


def require(job: str, packages: Sequence[str]) -> None:
    """UserError if one of a job's packages is not installed."""
    # find_spec does not import: the packages take a second.
    if missing := [x for x in packages if importlib.util.find_spec(x) is None]:
        raise UserError(
            f"{job} needs {', '.join(missing)}; run pip install 'sd3-jax[serve]'"
        )
