"""Recipes, flags and what a config may hold: from the command line to a ConfigDict."""
