"""Meshes, processes and what goes between them."""
