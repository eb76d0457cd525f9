"""PyTorch beside us: only `compare` and the tests import this, and it needs torch."""
