"""sd3_jax and PyTorch timed in turn, each in a process of its own."""
