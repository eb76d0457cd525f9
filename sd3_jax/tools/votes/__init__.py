"""Votes between pictures of several models: pages, results, preferences to train on."""
