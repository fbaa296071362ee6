"""Runs of a study: `python -m experiments.study`."""
