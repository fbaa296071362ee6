"""Synthetic tasks: generators and metrics in numpy, for every room."""
