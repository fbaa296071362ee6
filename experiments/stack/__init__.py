"""Levels on a pretrained model: `python -m experiments.stack`."""
