"""What a program does on a TPU slice, compiled without one."""
