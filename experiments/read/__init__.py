"""Reads a text and keeps the memory: `python -m experiments.read`."""
