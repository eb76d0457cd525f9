"""Metrics of a run, the services they go to, progress of long jobs, and goodput."""
