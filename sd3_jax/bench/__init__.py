"""sd3_jax beside PyTorch on a clock: cases, the two sides' processes, what they say.

Nothing here imports the data path, so that it runs where grain is not installed.
"""
