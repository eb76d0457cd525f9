"""What a program would do on a TPU slice that is not there: compiled, not run."""
