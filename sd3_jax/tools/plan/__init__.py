"""Bounds of programs on TPU slices, compiled without a TPU."""
