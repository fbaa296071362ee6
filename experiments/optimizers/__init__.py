"""Optimizers compared: `python -m experiments.optimizers`."""
