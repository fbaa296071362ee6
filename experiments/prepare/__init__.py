"""Tokens on disk, made ahead: `python -m experiments.prepare`."""
