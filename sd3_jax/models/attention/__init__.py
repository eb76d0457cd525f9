"""Softmax attention and its kernels."""
