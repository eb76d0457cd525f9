"""Stable Diffusion 3 (arXiv 2403.03206) in pure-functional JAX for TPU pods.

The functions of sd3_jax.api are here by name, and imported when they are asked for.
"""

__version__ = "0.1.0"
API = ("Bundle", "ControlBundle", "ControlInput", "Prompt")
API += ("generate", "load", "load_control", "save")


def __getattr__(name):
    if name not in API:
        raise AttributeError(f"module 'sd3_jax' has no attribute {name!r}")
    from sd3_jax import api

    return getattr(api, name)


def __dir__():
    return sorted([*globals(), *API])
