"""How good a model and its pictures are."""
