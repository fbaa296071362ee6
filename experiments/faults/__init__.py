"""Fault injection: `python -m experiments.faults`."""
