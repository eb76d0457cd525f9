"""Variants of a recipe compared as the paper compares them."""
