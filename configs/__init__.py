"""Recipes: `configs` in the repository, sd3_jax.configs once installed."""

import importlib.util
import sys

# They import one another as `configs`, which sd3_jax.config.command_line makes.
# Without it, a regular package of that name is left alone: it is not ours to hide.
if __name__ != "configs" and "configs" not in sys.modules:
    spec = importlib.util.find_spec("configs")
    if spec is None or spec.origin is None:
        sys.modules["configs"] = sys.modules[__name__]
