"""Stable Diffusion 3 (arXiv 2403.03206) in pure-functional JAX for TPU pods."""

__version__ = "0.1.0"
